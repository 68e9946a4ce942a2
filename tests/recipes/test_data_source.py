"""docs/extending.md, "A data source": a folder of pictures with their captions beside them becomes a dataset."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.recipes import Recipe, copied, lint, passed, run

pytestmark = pytest.mark.services

RECIPE = Recipe.read("A data source")
LLAVA = "import sys; from workflows.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copied(tmp_path_factory.mktemp("source"))
    RECIPE.follow(copy)
    return copy


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, one of them without a caption, one of them damaged."""
    folder = tmp_path_factory.mktemp("pairs")
    colours = random.Random(0)
    for number in range(12):
        Image.new("RGB", (48, 40), tuple(colours.randbytes(3))).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"Scene number {number}.")
    (folder / "03.txt").unlink()
    (folder / "07.png").write_bytes(b"no picture")
    return folder


def test_it_takes_one_new_file_and_its_line_in_the_table() -> None:
    assert list(RECIPE.changes) == ["components/shard/sources/__init__.py"]
    code = [path for path in RECIPE.new if not path.startswith("tests/")]
    assert code == ["components/shard/sources/pairs.py"]


def test_its_code_is_clean_and_its_own_test_passes(followed: Path) -> None:
    lint(followed, *RECIPE.new, *RECIPE.changes)
    assert passed(followed, "tests/components/shard/sources/test_pairs.py") == 1


def test_the_component_makes_a_dataset_of_it(followed: Path, pairs: Path, tmp_path: Path) -> None:
    settings = {"source": "pairs", "path": pairs, "heldout": 0.3, "rows_per_shard": 4, "max_bad": 0.5}
    given = [part for name, value in settings.items() for part in ("--set", f"shard.{name}={value}")]
    root = tmp_path / "root"
    done = run(followed, "-c", LLAVA, "shard", "tiny", "--root", str(root), "--json", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    artifact = Path(json.loads(done.stdout.splitlines()[-1])["artifacts"]["shard"])
    rows = [row for file in sorted(artifact.glob("*/*.parquet")) for row in pq.read_table(file).to_pylist()]
    kept = [number for number in range(12) if number not in (3, 7)]
    assert sorted(row["id"] for row in rows) == [f"{number:02d}" for number in kept]
    for row in rows:
        assert row["captions"] == [f"Scene number {int(row['id'])}."]
        assert row["image"]["bytes"] == (pairs / f"{row['id']}.png").read_bytes()
    refused = json.loads((artifact / "manifest.json").read_text())["notes"]["refused"]
    assert {reason: one["count"] for reason, one in refused.items()} == {"no-caption": 1, "unknown-format": 1}


def test_its_settings_are_told_and_refused_like_those_of_the_others(followed: Path, tmp_path: Path) -> None:
    done = run(followed, "-c", LLAVA, "shard", "tiny", "--root", str(tmp_path), "--set", "shard.source=pairs")
    assert done.returncode == 2
    assert "source=pairs needs path, the folder that holds the data" in done.stderr
    done = run(
        followed, "-c", LLAVA, "shard", "tiny", "--root", str(tmp_path), "--set", "shard.source=flickr"
    )
    assert done.returncode == 2
    assert "'pairs'" in done.stderr
