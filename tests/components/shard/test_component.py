"""`shard`: real sources through the real runner, MLflow store and Ray."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from components import tiny_world
from components.contract.manifest import Artifact
from components.contract.store import open_store
from components.shard import Shard, ShardSettings
from components.shard.sources import SOURCES, outcomes
from llava.data.images import decode
from llava.data.schema import DATASET_SCHEMA, images_of
from llava.errors import LlavaError, RefusedInput


def rows_of(artifact: Artifact, split: str = "*") -> list[dict[str, Any]]:
    files = sorted(artifact.local().glob(f"{split}/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.manifest.files}


def jpeg(side: int = 40, **options: Any) -> bytes:
    Image.new("RGB", (side, side), (10, 120, 200)).save(buffer := io.BytesIO(), format="JPEG", **options)
    return buffer.getvalue()


def outcomes_of(settings: ShardSettings) -> list[Any]:
    """What the source gives, without Ray."""
    listing = SOURCES[settings.source].listing(settings)
    return list(outcomes(settings, listing.shared, listing.items, open_store("/nowhere")))


def coco_data(folder: Path, photos: dict[str, bytes | None], boxes: dict[str, list] | None = None) -> Path:
    """A COCO folder in plain names; None leaves the photo's file out; `boxes` lists (category, bbox, crowd)."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, notes = [], []
    for number, (name, data) in enumerate(photos.items(), start=1):
        images.append({"id": number, "file_name": f"{name}.jpg"})
        notes.append({"image_id": number, "caption": f" photo {name}\n"})
        if data is not None:
            (folder / "images" / f"{name}.jpg").write_bytes(data)
    write(folder / "annotations" / "captions.json", {"images": images, "annotations": notes})
    if boxes is not None:
        ids = {image["file_name"].removesuffix(".jpg"): image["id"] for image in images}
        listed = [image for image in images if image["file_name"].removesuffix(".jpg") in boxes]
        drawn = [
            {"image_id": ids[name], "category_id": category, "bbox": box, "iscrowd": crowd}
            for name, found in boxes.items()
            for category, box, crowd in found
        ]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        instances = {"images": listed, "annotations": drawn, "categories": categories}
        write(folder / "annotations" / "instances.json", instances)
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def llava_data(folder: Path, records: list[Any], name: str = "mix.json") -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(jpeg())
    write(folder / name, records)
    return folder


def record(name: str, *values: str, image: Any = "a.jpg") -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": name, "conversations": turns} | ({"image": image} if image is not None else {})


def test_every_source_of_the_settings_is_in_the_table() -> None:
    assert set(SOURCES) == set(get_args(ShardSettings.model_fields["source"].annotation))


def test_shapes_become_a_dataset_that_keeps_each_scene_in_its_own_split(run_in: Any) -> None:
    outcome = run_in(Shard(), ShardSettings(scenes=50, seed=3, rows_per_shard=20))
    drawn = {scene.id: scene for scene in tiny_world.scenes(3, 50)}
    for split in ("train", "heldout"):
        rows = rows_of(outcome.artifact, split)
        assert [row["id"] for row in rows] == [name for name, scene in drawn.items() if scene.split == split]
        for row in rows:
            scene = drawn[row["id"]]
            assert (row["image"]["bytes"], row["captions"]) == (scene.png, scene.captions)
            assert [one["category"] for one in row["objects"]] == [category for category, _ in scene.objects]
            assert decode(row["image"]["bytes"]).size == (row["width"], row["height"])
    assert outcome.artifact.manifest.notes["rows"] == {
        split: sum(scene.split == split for scene in drawn.values()) for split in ("train", "heldout")
    }
    assert pq.read_schema(outcome.artifact.local() / "train/part-00000.parquet").equals(DATASET_SCHEMA)
    assert not (outcome.artifact.local() / "checkpoints").exists()


def test_one_worker_and_two_make_the_same_bytes(run_in: Any, tmp_path: Path) -> None:
    recipe = {"scenes": 40, "rows_per_shard": 7}
    one = run_in(Shard(), ShardSettings(**recipe, workers=1), root=tmp_path / "one").artifact
    two = run_in(Shard(), ShardSettings(**recipe, workers=2), root=tmp_path / "two").artifact
    assert len(contents(one)) > 6
    assert contents(one) == contents(two)
    assert one.digest == two.digest


def test_photos_keep_their_bytes_captions_and_boxes(run_in: Any, coco_folder: Path) -> None:
    settings = ShardSettings(source="coco", path=str(coco_folder), heldout=0.2, rows_per_shard=40)
    artifact = run_in(Shard(), settings).artifact
    rows = {row["id"]: row for row in rows_of(artifact)}
    captions = json.loads((coco_folder / "annotations/captions.json").read_text())
    instances = json.loads((coco_folder / "annotations/instances.json").read_text())
    listed = {image["id"] for image in instances["images"]}
    assert len(rows) == len(captions["images"])
    for image in captions["images"]:
        row = rows[image["file_name"].removesuffix(".jpg")]
        assert row["image"]["bytes"] == (coco_folder / "images" / image["file_name"]).read_bytes()
        assert (row["width"], row["height"]) == (image["width"], image["height"])
        told = [n["caption"] for n in captions["annotations"] if n["image_id"] == image["id"]]
        assert row["captions"] == [" ".join(caption.split()) for caption in told]
        single = [n for n in instances["annotations"] if n["image_id"] == image["id"] and not n["iscrowd"]]
        if image["id"] not in listed:
            assert row["objects"] is None
        else:
            assert [one["bbox"] for one in row["objects"]] == [pytest.approx(n["bbox"]) for n in single]
    crowds = sum(note["iscrowd"] for note in instances["annotations"])
    assert artifact.manifest.notes["left_out"].get("crowd", 0) == crowds
    assert {row["id"] for row in rows_of(artifact, "train")}.isdisjoint(
        row["id"] for row in rows_of(artifact, "heldout")
    )


def test_the_same_data_elsewhere_or_spelled_otherwise_is_found_again(
    run_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = coco_data(tmp_path / "data", {"a": jpeg(), "b": jpeg()})
    first = run_in(Shard(), ShardSettings(source="coco", path=str(data)))
    monkeypatch.chdir(tmp_path)
    again = run_in(Shard(), ShardSettings(source="coco", path="data"))
    assert (first.reused, again.reused) == (False, True)
    (data / "images" / "a.jpg").write_bytes(jpeg(side=50))
    assert not run_in(Shard(), ShardSettings(source="coco", path="data")).reused


def test_boxes_unknown_none_and_some_stay_three_things(run_in: Any, tmp_path: Path) -> None:
    boxes = {"none": [], "some": [(1, [1, 2, 3, 4], 0), (2, [0, 0, 9, 9], 1), (2, [5, 5, 0, 3], 0)]}
    data = coco_data(tmp_path / "data", {name: jpeg() for name in ("none", "some", "unlisted")}, boxes)
    artifact = run_in(Shard(), ShardSettings(source="coco", path=str(data), heldout=0)).artifact
    objects = {row["id"]: row["objects"] for row in rows_of(artifact)}
    assert objects == {"none": [], "some": [{"category": "cat", "bbox": [1, 2, 3, 4]}], "unlisted": None}
    assert artifact.manifest.notes["left_out"] == {"crowd": 1, "no-area": 1}


def test_a_photo_turned_by_exif_has_its_upright_size_and_unknown_boxes(run_in: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30)).save(buffer := io.BytesIO(), format="JPEG", exif=exif)
    data = coco_data(tmp_path / "data", {"turned": buffer.getvalue()}, {"turned": [(1, [1, 2, 3, 4], 0)]})
    artifact = run_in(Shard(), ShardSettings(source="coco", path=str(data), heldout=0)).artifact
    (row,) = rows_of(artifact)
    assert (row["width"], row["height"], row["objects"]) == (30, 60, None)
    assert artifact.manifest.notes["left_out"] == {"photos-turned-by-exif": 1}


def test_cocos_own_layout_is_read_and_two_years_beside_each_other_must_be_chosen(tmp_path: Path) -> None:
    data = coco_data(tmp_path / "data", {"a": jpeg()}, {"a": []})
    (data / "images").rename(data / "train2017")
    for name in ("captions", "instances"):
        (data / "annotations" / f"{name}.json").rename(data / "annotations" / f"{name}_train2017.json")
    settings = ShardSettings(source="coco", path=str(data))
    assert outcomes_of(settings)[0].row["objects"] == []
    (data / "annotations" / "captions_val2017.json").write_text("{}")
    with pytest.raises(RefusedInput, match=r"several: .*captions_val2017.*shard\.captions"):
        Shard().check(settings, {})


def test_bad_photos_are_refused_by_reason_and_listed(run_in: Any, tmp_path: Path, lines: Any) -> None:
    photos: dict[str, bytes | None] = {f"good{number:02d}": jpeg() for number in range(16)}
    photos |= {
        "absent": None,
        "cut": jpeg(side=200)[:800],
        "page": b"<html>not found</html>",
        "dot": jpeg(side=2),
    }
    data = coco_data(tmp_path / "data", photos)
    settings = ShardSettings(source="coco", path=str(data), max_bad=0.2, rows_per_shard=6, heldout=0)
    artifact = run_in(Shard(), settings).artifact
    reasons = {"absent": "image-missing", "cut": "broken", "page": "unknown-format", "dot": "too-few-pixels"}
    assert artifact.manifest.notes["refused"] == {
        reason: {"count": 1, "ids": [name]}
        for name, reason in sorted(reasons.items(), key=lambda one: one[1])
    }
    listed = [json.loads(line) for line in (artifact.local() / "refused.jsonl").read_text().splitlines()]
    assert {one["id"]: one["reason"] for one in listed} == reasons
    assert {row["id"] for row in rows_of(artifact)} == {name for name in photos if name.startswith("good")}
    assert artifact.manifest.metrics["refused"] == 4


def test_too_many_bad_photos_fail_the_run_in_one_line_that_names_them(run_in: Any, tmp_path: Path) -> None:
    data = coco_data(tmp_path / "data", {"a": jpeg(), "b": None, "c": None})
    with pytest.raises(
        LlavaError, match=r"2 of 3 samples refused, limit shard\.max_bad=0\.5: 2 x image-missing"
    ) as e:
        run_in(Shard(), ShardSettings(source="coco", path=str(data), max_bad=0.5))
    assert "\n" not in str(e.value)
    assert "such as b:" in str(e.value)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("x", "<image>\nWhat?", "A cat.", image="../secret.jpg"), "image-path"),
        (record("x", "<image>\nWhat?", "A cat.", image="/etc/passwd"), "image-path"),
        (record("x", "<image>\nWhat?", "A cat.", image=7), "image-path"),
        (record("x", "<image>\nWhat?", "A cat.", image=["a.jpg", 7]), "image-path"),
        (record("x", "<image>\nWhat?", "A cat.", image=["a.jpg", "a.jpg"]), "slots"),
        (record("x", "<image> or\n<image>?", "Both.", image=["a.jpg", "b.jpg"]), "image-missing"),
        (record("x", "<image>\nWhat?", "A cat.", image="b.jpg"), "image-missing"),
        (record("x", "What?", "A cat."), "slots"),
        (record("x", "<image> and <image>?", "Cats."), "slots"),
        (record("x", "<image>\nWhat?", "A cat.", image=None), "slot-without-image"),
        (record("x", "<image>\nWhat?", "A cat.", "Sure?"), "roles"),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "A cat."}] * 2}, "roles"),
        ({"id": "x", "conversations": [{"from": "human"}, {"from": "gpt", "value": "A."}]}, "turn"),
        ({"id": "x", "conversations": []}, "no-turns"),
        ("no record", "no-record"),
    ],
)
def test_a_record_that_cannot_be_learned_from_has_its_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    data = llava_data(tmp_path / "data", [bad])
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    settings = ShardSettings(source="llava", path=str(data))
    (refused,) = outcomes_of(settings)
    assert refused.reason == reason


@pytest.mark.parametrize("name", ["mix.json", "mix.jsonl"])
def test_conversations_keep_their_turns_and_texts_alone_are_let_in(
    tmp_path: Path, name: str, run_in: Any
) -> None:
    records = [
        record("one", "<image>\nWhat?", "A cat, <image> of grace.", "Sure?", "Yes."),
        record("one", "Where?\n<image>", "Here.", image=["a.jpg"]),
        record("text", "Hello.", "Hi.", image=None),
    ]
    data = llava_data(tmp_path / "data", records, name)
    if name.endswith(".jsonl"):
        (data / name).write_text("".join(json.dumps(one) + "\n" for one in records))
    artifact = run_in(Shard(), ShardSettings(source="llava", path=str(data), heldout=0)).artifact
    rows = rows_of(artifact)
    assert [row["conversations"] for row in rows] == [one["conversations"] for one in records]
    assert [(row["image"] is None, row["width"]) for row in rows] == [(False, 40), (False, 40), (True, 0)]


def test_a_record_with_several_photos_keeps_all_of_them_in_their_order(tmp_path: Path, run_in: Any) -> None:
    records = [
        record("pair", "<image>\nAnd <image>?", "Alike.", "Sure?", "Yes.", image=["a.jpg", "b.jpg"]),
        record("one", "<image>\nWhat?", "It."),
        record(
            "later", "First: <image>", "A.", "Then: <image> <image>", "B.", image=["b.jpg", "a.jpg", "b.jpg"]
        ),
    ]
    data = llava_data(tmp_path / "data", records)
    (data / "images" / "b.jpg").write_bytes(jpeg(side=70))
    artifact = run_in(Shard(), ShardSettings(source="llava", path=str(data), heldout=0)).artifact
    rows = rows_of(artifact)
    assert [[cell["path"] for cell in images_of(row)] for row in rows] == [
        ["a.jpg", "b.jpg"], ["a.jpg"], ["b.jpg", "a.jpg", "b.jpg"]
    ]  # fmt: skip
    assert [[decode(cell["bytes"]).width for cell in images_of(row)] for row in rows] == [
        [40, 70],
        [40],
        [70, 40, 70],
    ]
    assert [row["width"] for row in rows] == [40, 40, 70]
    assert [row["more_images"] is None for row in rows] == [False, True, False]
    assert artifact.manifest.notes["figures"]["images"]["most"] == 3


def test_all_records_of_a_photo_fall_into_one_split(tmp_path: Path) -> None:
    settings = ShardSettings(source="llava", path=str(tmp_path), heldout=0.5)
    data = llava_data(tmp_path / "data", [])
    for number in range(12):
        (data / "images" / f"{number}.jpg").write_bytes(jpeg())
    records = [
        record(f"{number}-{turn}", "<image>\nWhat?", "It.", image=f"{number}.jpg")
        for number in range(12)
        for turn in range(3)
    ]
    write(data / "mix.json", records)
    settings = ShardSettings(source="llava", path=str(data), heldout=0.5)
    splits: dict[str, set[str]] = {}
    for loaded in outcomes_of(settings):
        splits.setdefault(loaded.row["image"]["path"], set()).add(loaded.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "heldout"}


def test_more_data_later_moves_no_photo_to_the_other_split(tmp_path: Path) -> None:
    names = [f"{number:03d}" for number in range(30)]
    few = ShardSettings(
        source="coco", path=str(coco_data(tmp_path / "few", dict.fromkeys(names[::3], jpeg()))), heldout=0.4
    )
    many = few.model_copy(update={"path": str(coco_data(tmp_path / "many", dict.fromkeys(names, jpeg())))})
    before, after = _splits(few), _splits(many)
    assert before == {name: after[name] for name in before}
    assert set(before.values()) == {"train", "heldout"}


def _splits(settings: ShardSettings) -> dict[str, str]:
    return {one.row["id"]: one.split for one in outcomes_of(settings)}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"source": "coco"}, "source=coco needs path"),
        ({"source": "shapes", "path": "x"}, "path is for source=coco"),
        ({"source": "flickr"}, "'shapes', 'coco', 'llava', "),
        ({"source": "coco", "path": "x", "captions": "../c.json"}, "must be a relative path inside path"),
        ({"min_pixels": 10, "max_pixels": 5}, "nothing fits"),
        ({"max_pixels": 64_000_001}, "max_pixels\n  Input should be less than or equal to 64000000"),
        ({"max_image_bytes": 2**26 + 1}, "max_image_bytes\n  Input should be less than or equal to 67108864"),
    ],
)
def test_impossible_settings_are_refused_with_the_key(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        ShardSettings(**settings)


def test_a_data_folder_that_is_missing_or_no_coco_is_refused_before_work(tmp_path: Path, run_in: Any) -> None:
    with pytest.raises(RefusedInput, match=r"shard\.path=.*nowhere: no such folder"):
        run_in(Shard(), ShardSettings(source="coco", path=str(tmp_path / "nowhere")))
    data = coco_data(tmp_path / "data", {"a": jpeg()})
    with pytest.raises(RefusedInput, match=r"shard\.captions=other\.json: .* does not exist"):
        run_in(Shard(), ShardSettings(source="coco", path=str(data), captions="other.json"))
    for text, told in (
        ("{", "not valid JSON"),
        ("[]", "no list images"),
        ('{"images": [{}], "annotations": []}', "file_name"),
    ):
        (data / "annotations" / "captions.json").write_text(text)
        with pytest.raises(RefusedInput, match=told):
            run_in(Shard(), ShardSettings(source="coco", path=str(data)))


def test_source_and_root_may_both_be_s3(ray_local: str, s3_root: str, run_in: Any, tmp_path: Path) -> None:
    data = coco_data(tmp_path / "data", {"a": jpeg(), "b": jpeg(), "c": None})
    store = open_store(f"{s3_root}/data")
    for path in data.rglob("*.*"):
        store.upload(path, path.relative_to(data).as_posix())
    settings = ShardSettings(source="coco", path=store.uri, heldout=0, max_bad=0.5, rows_per_shard=2)
    artifact = run_in(Shard(), settings, root=f"{s3_root}/root").artifact
    assert [row["id"] for row in rows_of(artifact)] == ["a", "b"]
    assert artifact.manifest.notes["refused"]["image-missing"]["ids"] == ["c"]


def test_random_bytes_in_a_photo_never_end_the_run(run_in: Any, tmp_path: Path) -> None:
    rng = random.Random(5)
    photos = {f"{number:02d}": bytes(rng.randbytes(rng.randrange(0, 300))) for number in range(10)}
    photos |= {f"good{number}": jpeg() for number in range(2)}
    data = coco_data(tmp_path / "data", photos)
    artifact = run_in(Shard(), ShardSettings(source="coco", path=str(data), max_bad=0.9, heldout=0)).artifact
    assert artifact.manifest.metrics == artifact.manifest.metrics | {"rows": 2, "refused": 10}
