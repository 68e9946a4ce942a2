"""The quality report: what it finds in real and in hostile data, and where it can be read."""

from __future__ import annotations

import io
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from components.contract.manifest import Artifact
from components.shard import Shard, ShardSettings
from components.shard.fingerprints import BITS_APART, COLOURS_APART, NEIGHBOURS, fingerprint, groups, near
from components.shard.report import contact_sheet
from llava.data.images import Limits
from tests.support.pages import ALLOWED, HOSTILE, Seen
from workflows.show import show


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture with structure: coloured noise of a few pixels, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), format=kind, **options)
    return buffer.getvalue()


def llava_data(folder: Path, samples: list[tuple[str, str, bytes | None]]) -> Path:
    """A LLaVA folder: (id, answer, picture) of each sample; the same bytes are one file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records, names = [], dict[bytes, str]()
    for name, answer, data in samples:
        slot, image = "", {}
        if data is not None:
            file = names.setdefault(data, f"{len(names):04d}.png")
            (folder / "images" / file).write_bytes(data)
            slot, image = "<image>\n", {"image": file}
        turns = [{"from": "human", "value": f"{slot}What?"}, {"from": "gpt", "value": answer}]
        records.append({"id": name, **image, "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(records))
    return folder


def sharded(run_in: Any, data: Path, **settings: Any) -> Artifact:
    given = {"source": "llava", "path": str(data), "heldout": 0, **settings}
    artifact: Artifact = run_in(Shard(), ShardSettings(**given)).artifact
    return artifact


def page_of(artifact: Artifact) -> Seen:
    return Seen((artifact.local() / "report/quality.html").read_text())


def copies_of(photo: Image.Image) -> dict[str, bytes]:
    """The photo as other places may have it; a PNG where the copy is to differ in one thing only."""
    width, height = photo.size
    border = (width // 100, height // 100, width - width // 100, height - height // 100)
    return {
        "as it is": encoded(photo, "JPEG", quality=95),
        "JPEG quality 20": encoded(photo, "JPEG", quality=20),
        "a quarter of the sides": encoded(photo.resize((width // 4, height // 4), Image.Resampling.LANCZOS)),
        "5 % brighter": encoded(photo.point(lambda value: min(255, round(1.05 * value))), "JPEG"),
        "1 % of the border cut off": encoded(photo.crop(border), "JPEG"),
    }


def test_a_real_photo_is_near_its_copies_and_no_other_photo(coco_folder: Path) -> None:
    photos = [Image.open(file).convert("RGB") for file in sorted(coco_folder.glob("images/*.jpg"))[::2]]
    copies = [copies_of(one) for one in photos]
    started = time.process_time()
    prints = [fingerprint(data, Limits()) for found in copies for data in found.values()]
    took = (time.process_time() - started) / len(prints)
    gradients, colours = (np.array([list(one[part]) for one in prints], np.uint8) for part in (0, 1))
    pairs, kinds = near(gradients, colours), list(copies[0])
    assert not [pair for pair in pairs.tolist() if len({one // len(kinds) for one in pair}) > 1]
    group_of = {one: group[0] for group in groups(pairs) for one in group}
    shares = {
        kind: float(
            np.mean(
                [group_of.get(len(kinds) * one + number) == len(kinds) * one for one in range(len(photos))]
            )
        )
        for number, kind in enumerate(kinds)
    }
    print(f"\n{len(photos)} photos, {1000 * took:.1f} ms of CPU each, found again:", shares)
    assert shares.pop("1 % of the border cut off") > 0.8
    assert set(shares.values()) == {1.0}


def test_near_finds_what_comparing_everything_with_everything_finds() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.integers(0, 256, (300, 16), dtype=np.uint8)
    colours = rng.integers(0, 256, (300, 27), dtype=np.uint8)
    for number in range(100):
        bits = np.unpackbits(gradients[number])
        bits[rng.choice(128, rng.integers(0, 2 * BITS_APART), replace=False)] ^= 1
        gradients[200 + number] = np.packbits(bits)
        shift = rng.integers(-COLOURS_APART - 4, COLOURS_APART + 5, 27)
        colours[200 + number] = np.clip(colours[number] + (shift if number % 2 else 0), 0, 255)
    expected = [
        [first, second]
        for first, second in itertools.combinations(range(300), 2)
        if np.bitwise_count(gradients[first] ^ gradients[second]).sum() <= BITS_APART
        and np.abs(colours[first].astype(int) - colours[second]).max() <= COLOURS_APART
    ]
    assert 20 < len(expected) < 100
    assert near(gradients, colours).tolist() == expected


def test_a_crowd_of_blank_pictures_costs_no_square_of_comparisons() -> None:
    colours = np.zeros((20_000, 27), np.uint8)
    colours[10_000:, :2] = np.random.default_rng(0).integers(0, COLOURS_APART, (10_000, 2))
    pairs = near(np.zeros((20_000, 16), np.uint8), colours)
    assert len(pairs) < (NEIGHBOURS + 1) * 20_000
    assert [len(group) for group in groups(pairs)] == [20_000]


def test_groups_join_what_hangs_together() -> None:
    pairs = np.array([[5, 6], [1, 2], [2, 9], [0, 9]])
    assert groups(pairs) == [[0, 1, 2, 9], [5, 6]]
    assert groups(np.empty((0, 2), int)) == []


def test_what_a_dataset_holds_twice_is_counted_with_ids(run_in: Any, tmp_path: Path) -> None:
    first, second = photo(1), photo(2)
    samples = [
        ("one", "A cat.", encoded(first)),
        ("again", "A cat.", encoded(first)),
        ("other-text", "A dog.", encoded(first)),
        ("smaller", "A cat.", encoded(first.resize((48, 32)), "JPEG", quality=80)),
        ("alone", "A bird.", encoded(second)),
        ("text", "Hello.", None),
        ("text-again", "Hello.", None),
    ]
    artifact = sharded(run_in, llava_data(tmp_path / "data", samples))
    found = artifact.manifest.notes["duplicates"]
    assert found == {
        "pictures": 5,
        "different pictures": 3,
        "samples twice": 2,
        "pictures that look alike": 2,
        "groups that look alike": 1,
        "pictures in both splits": 0,
        "groups that look alike in both splits": 0,
        "such as": {"twice": [["one", "again"], ["text", "text-again"]], "alike": [["one", "smaller"]]},
    }
    assert artifact.manifest.metrics["duplicates/different_pictures"] == 3
    text = page_of(artifact).text
    assert "one, again" in text and "one, smaller" in text and "alone" not in text


def test_a_picture_that_stands_in_both_splits_is_told(run_in: Any, tmp_path: Path) -> None:
    # Two files with the same bytes: the split goes by the name of the file.
    data = tmp_path / "data"
    samples = [(f"{number}", "A cat.", encoded(photo(number))) for number in range(40)]
    llava_data(data, samples)
    for file in sorted((data / "images").iterdir())[20:]:
        file.write_bytes((data / "images" / "0000.png").read_bytes())
    artifact = sharded(run_in, data, heldout=0.3)
    assert artifact.manifest.notes["duplicates"]["pictures in both splits"] == 1
    assert "Pictures in both splits" in page_of(artifact).text


def test_text_and_ids_of_the_data_stay_text_in_the_page(run_in: Any, tmp_path: Path) -> None:
    samples = [
        (f"{number} {text}", text.replace("\x00", ""), encoded(photo(number)))
        for number, text in enumerate(HOSTILE)
    ]
    samples += [(f"twice {text}", "same", encoded(photo(99))) for text in HOSTILE]
    samples = [(name.replace("\x00", ""), text, data) for name, text, data in samples]
    samples += [
        (f"bad {text}".replace("\x00", ""), "x", b"no picture %d" % number)
        for number, text in enumerate(HOSTILE)
    ]
    artifact = sharded(run_in, llava_data(tmp_path / "data", samples), max_bad=0.5)
    seen = page_of(artifact)
    assert {tag for tag, _ in seen.elements} <= ALLOWED
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    assert all((one.get("src") or "data:image/").startswith("data:image/") for _, one in seen.elements)
    assert seen.text.count("bad <script>alert(1)</script>") == 1
    assert "twice <script>alert(1)</script>" in seen.text and "unknown-format" in seen.text


def test_the_contact_sheet_holds_large_pictures_in_the_size_that_it_shows() -> None:
    cells = []
    for size in ((3000, 1500), (60, 30)):
        Image.new("RGB", size, (10, 120, 200)).save(buffer := io.BytesIO(), format="JPEG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    rows = [{"image": cell, "captions": ["a cat"], "conversations": None} for cell in cells]
    shown = [axis.images[0].get_array().shape for axis in contact_sheet(rows).axes if axis.images]
    assert shown == [(120, 240, 3), (30, 60, 3)]


def test_the_page_and_the_contact_sheet_are_in_mlflow_and_show_saves_them(
    run_in: Any,
    tmp_path: Path,
    mlflow_db: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = run_in(Shard(), ShardSettings(scenes=30)).artifact
    logged = {file.path for file in MlflowClient(mlflow_db).list_artifacts(artifact.manifest.mlflow_run_id)}
    assert {"quality.html", "samples.png"} <= logged
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    show(artifact.uri)
    name = f"shard-{artifact.digest[:8]}"
    assert {file.name for file in here.iterdir()} == {f"{name}-quality.html", f"{name}-samples.png"}
    with Image.open(here / f"{name}-samples.png") as sheet:
        assert sheet.width > 1000
    told = capsys.readouterr().err
    assert "note      duplicates, pictures: 30" in told and f"saved     {name}-samples.png" in told


def test_shards_that_were_looked_at_once_are_not_looked_at_again(run_in: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    first = run_in(Shard(), ShardSettings(scenes=60, rows_per_shard=20), root=root).artifact
    kept = {file: file.stat().st_mtime_ns for file in root.glob("fingerprints/*")}
    assert len(kept) == sum(file.path.endswith(".parquet") for file in first.manifest.files)
    # Another dataset with the same first shards.
    run_in(Shard(), ShardSettings(scenes=80, rows_per_shard=20), root=root)
    now = {file: file.stat().st_mtime_ns for file in root.glob("fingerprints/*")}
    assert len(now) > len(kept) and {file: now[file] for file in kept} == kept


def test_without_the_second_look_the_page_tells_what_is_known_anyway(run_in: Any, tmp_path: Path) -> None:
    artifact = run_in(Shard(), ShardSettings(scenes=30, quality=False)).artifact
    assert "duplicates" not in artifact.manifest.notes
    assert not list((tmp_path / "root").glob("fingerprints/*"))
    text = page_of(artifact).text
    assert "caption, words" in text and "Duplicates" not in text


def test_the_second_look_is_no_part_of_the_recipe(run_in: Any) -> None:
    plain, quick = (ShardSettings(scenes=30, quality=quality) for quality in (True, False))
    assert run_in(Shard(), plain).artifact.digest == run_in(Shard(), quick).artifact.digest


def test_a_dataset_of_texts_alone_has_a_page_too(run_in: Any, tmp_path: Path) -> None:
    samples = [(f"{number}", f"Text {random.Random(number).random()}", None) for number in range(5)]
    artifact = sharded(run_in, llava_data(tmp_path / "data", samples))
    assert artifact.manifest.notes["duplicates"]["pictures"] == 0
    assert "Words of a sample's texts" in page_of(artifact).text
