"""docs/extending.md, "A training stage": planned, trained, cached, found by contamination and prune, estimated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.contract import artifact_folders, find_artifact, open_artifact, open_store
from components.evaluate import contamination
from tests.support.recipes import Recipe, copied, lint, run
from tests.support.whole_run import SMALL

pytestmark = pytest.mark.services

RECIPE = Recipe.read("A training stage")
LLAVA = "import sys; from workflows.cli import main; sys.exit(main())"
OWN = ["--set", "align.precision=fp32", "--set", "align.max_length=512", "--set", "align.zero_stage=0",
       "--set", "align.global_batch=16", "--set", "align.epochs=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copied(tmp_path_factory.mktemp("stage"))
    RECIPE.follow(copy)
    return copy


def finetune(followed: Path, root: Path) -> dict[str, Any]:
    done = run(followed, "-c", LLAVA, "finetune", "tiny", *SMALL, *OWN, "--root", str(root), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


@pytest.fixture(scope="module")
def made(followed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("root")
    return root, finetune(followed, root)


def test_it_takes_one_new_file_and_its_line_in_the_table() -> None:
    assert list(RECIPE.new) == ["components/align.py"]
    assert list(RECIPE.changes) == ["workflows/stages.py"]


def test_its_code_is_clean(followed: Path) -> None:
    lint(followed, *RECIPE.new, *RECIPE.changes)


def test_estimate_knows_it_and_its_mistakes_are_told_with_those_of_the_others(
    followed: Path, tmp_path: Path
) -> None:
    done = run(followed, "-c", LLAVA, "estimate", "tiny", "--gpus", "1", "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert list(stages) == ["pretrain", "align", "finetune"]
    assert stages["align"]["training"] == "frozen"
    wrong = ["--set", "shard.source=coco", "--set", f"shard.path={tmp_path}/none", "--set", "align.gpu=true"]
    done = run(followed, "-c", LLAVA, "align", "tiny", *OWN, *wrong, "--root", str(tmp_path / "root"))
    assert (
        done.returncode == 2 and "2 mistakes" in done.stderr and "align: 1 workers take 1 GPU" in done.stderr
    ), done.stderr


@pytest.mark.drill
def test_it_is_planned_between_the_stages_and_trains_the_projector_alone(
    made: tuple[Path, dict[str, Any]],
) -> None:
    artifacts = made[1]["artifacts"]
    order = [name for name in artifacts if name in ("pretrain", "align", "finetune")]
    assert order == ["pretrain", "align", "finetune"]
    align, finetuned = open_artifact(artifacts["align"]), open_artifact(artifacts["finetune"])
    assert finetuned.manifest.inputs["model"] == align.digest
    assert align.manifest.inputs["model"] == open_artifact(artifacts["pretrain"]).digest
    assert align.manifest.metrics["train/steps"] >= 1


@pytest.mark.drill
def test_it_is_found_again(followed: Path, made: tuple[Path, dict[str, Any]]) -> None:
    assert "align" in finetune(followed, made[0])["reused"]


@pytest.mark.drill
def test_code_that_does_not_know_the_stage_finds_its_artifacts(made: tuple[Path, dict[str, Any]]) -> None:
    root, summary = made
    store = open_store(root)
    align = open_artifact(summary["artifacts"]["align"])
    found = find_artifact(align.digest, [store])
    assert found is not None and found.uri == align.uri
    datasets, unknown = contamination._lineage(open_artifact(summary["artifacts"]["finetune"]), [store])
    assert unknown == [] and len(datasets) == 2
    assert f"align/{align.digest[:16]}" in artifact_folders(store)


@pytest.mark.drill
def test_prune_knows_it(followed: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root = shutil.copytree(made[0], tmp_path / "root")
    done = run(followed, "-c", LLAVA, "prune", "--root", str(root), "--fresh", "0")
    assert done.returncode == 0, done.stderr
    assert "/align/" in done.stdout + done.stderr
