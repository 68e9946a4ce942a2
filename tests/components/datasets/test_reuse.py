"""A data set that grew: what was there is copied, what was added is made, and the bytes are those of a fresh run."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.contract.manifest import Artifact
from components.contract.store import open_store
from components.shard import Shard, ShardSettings
from components.shard.sources import SOURCES
from components.shard.sources.base import Listing, mark
from llava.errors import LlavaError


def cut(names: Sequence[str], rows: int) -> list[tuple[str, ...]]:
    marks = np.array([mark(name) for name in names], np.uint64)
    return [tuple(items) for items, _ in Listing(names, marks=marks).shards(rows)]


@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_a_tenth_more_names_in_one_place_change_about_a_tenth_of_the_shards(where: float) -> None:
    names = [f"{random.Random(number).getrandbits(64):x}" for number in range(20_000)]
    place = round(where * len(names))
    grown = [*names[:place], *(f"new-{number}" for number in range(2_000)), *names[place:]]
    before, after = cut(names, 200), cut(grown, 200)
    new = [shard for shard in after if shard not in set(before)]
    assert [name for shard in after for name in shard] == grown
    assert len(after) * 0.09 < len(new) < len(after) * 0.12


def test_a_shard_holds_at_least_half_and_at_most_all_of_the_rows() -> None:
    sizes = [len(shard) for shard in cut([str(number) for number in range(5_000)], 100)]
    assert max(sizes) <= 100
    assert min(sizes[:-1]) >= 50


def jpeg(number: int) -> bytes:
    colour = (number % 256, number // 256 % 256, 90)
    Image.new("RGB", (24, 24), colour).save(buffer := io.BytesIO(), format="JPEG")
    return buffer.getvalue()


def coco(folder: Path, count: int) -> ShardSettings:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images = [{"id": number, "file_name": f"{number * 7919 % 10007:05d}.jpg"} for number in range(count)]
    notes = [{"image_id": number, "caption": f"photo {number}"} for number in range(count)]
    for number, image in enumerate(images):
        path = folder / "images" / str(image["file_name"])
        if not path.exists():
            path.write_bytes(jpeg(number))
    (folder / "annotations" / "captions.json").write_text(
        json.dumps({"images": images, "annotations": notes})
    )
    return ShardSettings(source="coco", path=str(folder), rows_per_shard=20, heldout=0.1, quality=False)


def contents(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.manifest.files}


def test_a_tenth_more_photos_make_a_tenth_of_the_shards_and_the_same_bytes_as_afresh(
    run_in: Any, root: str, tmp_path: Path, lines: Any
) -> None:
    first = run_in(Shard(), coco(tmp_path / "data", 300), root=root).artifact
    grown = run_in(Shard(), coco(tmp_path / "data", 330), root=root).artifact
    made, copied = (grown.manifest.notes["shards"][which] for which in ("made", "copied"))
    assert first.manifest.notes["shards"]["copied"] == 0
    print(f"300 photos grew to 330: {made} of {made + copied} shards made, {copied} copied")
    assert made <= 0.2 * (made + copied)
    assert f"{copied} of {made + copied} shards copied from earlier datasets of this root" in lines.said
    fresh = run_in(Shard(), coco(tmp_path / "data", 330), root=tmp_path / "elsewhere").artifact
    assert fresh.manifest.notes["shards"]["copied"] == 0
    assert contents(grown) == contents(fresh)
    told = ("rows", "figures", "objects", "left_out", "dataset_digest")
    assert {key: grown.manifest.notes[key] for key in told} == {
        key: fresh.manifest.notes[key] for key in told
    }
    lines_of = [json.loads(line) for line in (fresh.local() / "shards.jsonl").read_text().splitlines()]
    listed = {file["path"]: file["sha256"] for line in lines_of for file in line["files"]}
    assert listed == {path: sha256 for path, sha256 in contents(fresh).items() if path.endswith(".parquet")}
    assert sum(file["rows"] for line in lines_of for file in line["files"]) == 330


def test_a_photo_that_changed_is_read_again_and_a_damaged_copy_is_never_taken(
    run_in: Any, tmp_path: Path
) -> None:
    settings = coco(tmp_path / "data", 100)
    first = run_in(Shard(), settings).artifact
    changed = next(iter(sorted((tmp_path / "data" / "images").iterdir())))
    changed.write_bytes(jpeg(5000))
    second = run_in(Shard(), settings).artifact
    assert second.manifest.notes["shards"]["made"] == 1
    damaged = first.local() / first.manifest.files[-1].path
    assert damaged.name.endswith(".parquet")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    spelled = settings.model_copy(update={"captions": "annotations/captions.json"})
    third = run_in(Shard(), spelled).artifact
    fresh = run_in(Shard(), spelled, root=tmp_path / "fresh").artifact
    assert third.manifest.notes["shards"]["made"] <= 1
    assert contents(third) == contents(fresh)


def test_a_run_that_stopped_before_its_source_grew_leaves_its_finished_shards_to_the_next(
    run_in: Any, root: str, tmp_path: Path
) -> None:
    settings = coco(tmp_path / "data", 300).model_copy(update={"workers": 1, "max_bad": 0.0})
    (tmp_path / "data" / "images" / f"{200 * 7919 % 10007:05d}.jpg").write_bytes(b"no picture")
    with pytest.raises(LlavaError, match="1 of 300 samples refused"):
        run_in(Shard(), settings, root=root)
    store = open_store(root).sub("shard")
    records = [entry.key for entry in store.list() if "/checkpoints/shards/" in entry.key]
    file = f"{records[0].partition('/')[0]}/{json.loads(store.read(records[0]))['files'][0]['path']}"
    store.write(file, store.read(file)[:-1])
    before = {entry.key: entry.version for entry in store.list()}
    settings = coco(tmp_path / "data", 330).model_copy(update={"max_bad": 0.01})
    grown = run_in(Shard(), settings, root=root).artifact
    assert grown.manifest.notes["shards"]["copied"] == len(records) - 1 >= 5
    after = {entry.key: entry.version for entry in store.list() if entry.key in before}
    assert after == before, "the stopped run's own files stay as they are"
    fresh = run_in(Shard(), settings, root=tmp_path / "elsewhere").artifact
    assert contents(grown) == contents(fresh)


def test_another_recipe_for_rows_takes_no_old_shard(run_in: Any, tmp_path: Path) -> None:
    settings = coco(tmp_path / "data", 60)
    run_in(Shard(), settings)
    for change in ({"heldout": 0.5}, {"rows_per_group": 7}, {"max_text": 100}):
        artifact = run_in(Shard(), settings.model_copy(update=change)).artifact
        assert artifact.manifest.notes["shards"]["copied"] == 0


def test_records_of_one_photo_never_fall_into_two_shards(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    records = [
        {"id": f"{photo}-{turn}", "image": f"{photo}.jpg", "conversations": turns}
        for turn in range(2)
        for photo in range(300)
    ]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    listing = SOURCES["llava"].listing(ShardSettings(source="llava", path=str(tmp_path)))
    shards = [{json.loads(data)["image"] for _, data in items} for items, _ in listing.shards(25)]
    assert sum(map(len, shards)) == len(set.union(*shards)) == 300
