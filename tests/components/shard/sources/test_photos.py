"""Where photos lie: several roots, paths that lead elsewhere, photos that cannot be read."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from components.contract.store import FolderStore, open_store
from components.shard import Shard
from components.shard.sources import SOURCES, outcomes
from components.shard.sources.base import RefusedSample
from llava.data.images import decode
from tests.support.sources import (
    coco,
    found,
    in_folder,
    in_tar,
    in_zip,
    jpeg,
    llava,
    photos,
    told,
)


def test_photos_lie_in_several_roots_each_for_the_paths_that_begin_with_its_prefix(tmp_path: Path) -> None:
    files = photos(4)
    first, second, third, fourth = files.values()
    in_folder(tmp_path, "data/images", {"here.jpg": first})
    in_folder(tmp_path, "gqa", {"a.jpg": second, "here.jpg": b"never reached"})
    in_zip(tmp_path, "ocr", {"b.jpg": third})
    in_tar(tmp_path, "vg", {"./vg/c.jpg": fourth})
    settings = llava(
        tmp_path / "data",
        ["here.jpg", "gqa/images/a.jpg", "ocr/b.jpg", "c.jpg", "ocr/c.png", ["here.jpg", "c.jpg"], None],
        roots=(f"gqa/images/={tmp_path}/gqa", f"ocr/={tmp_path}/ocr.zip", f"{tmp_path}/vg.tar"),
    )
    rows = {one.row["id"]: one.row for one in found(settings) if not isinstance(one, RefusedSample)}
    assert [rows[f"r{n}"]["image"]["bytes"] for n in (0, 1, 2, 3, 5)] == [*files.values(), first]
    assert rows["r5"]["more_images"] == [{"bytes": fourth, "path": "c.jpg"}]
    assert "image" not in rows["r6"]
    assert told(settings)["r4"] == "image-missing"


def test_a_photo_added_to_any_root_changes_the_fingerprint(tmp_path: Path) -> None:
    in_folder(tmp_path, "more", photos(1))
    settings = llava(tmp_path / "data", ["000.jpg"], roots=(f"{tmp_path}/more",))
    before = Shard().external(settings)
    in_folder(tmp_path, "more", {"new.jpg": jpeg()})
    after = Shard().external(settings)
    assert before.keys() == after.keys() == {"llava", "photos 0"}
    assert before["photos 0"] != after["photos 0"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "s3://other-bucket/a.jpg", "file:///etc/passwd",
        "a//b.jpg", "", ".", "a\\..\\b.jpg", "nul\0.jpg", "half\ud800.jpg", "x" * 300 + ".jpg", "d/" * 600 + "a.jpg",
    ],
)  # fmt: skip
def test_an_image_path_that_leads_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    in_folder(tmp_path / "data", "images", photos(1))
    assert told(llava(tmp_path / "data", [path])) == {"r0": "image-path"}


def test_a_photo_that_cannot_be_read_is_one_refused_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder(tmp_path, "images", photos(2) | {"closed.jpg": jpeg()})
    settings = llava(tmp_path, ["000.jpg", "loop.jpg", "closed.jpg", "001.jpg"])
    settings = settings.model_copy(update={"images": "images"})
    listing = SOURCES["llava"].listing(settings)
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    fetch = FolderStore.fetch

    def closed(store: FolderStore, key: str) -> Any:
        if key.endswith("closed.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied", key)
        return fetch(store, key)

    monkeypatch.setattr(FolderStore, "fetch", closed)  # root may read everything
    outcomes_ = list(outcomes(settings, listing.shared, listing.items, open_store("/nowhere")))
    assert [getattr(one, "reason", "") for one in outcomes_] == ["", "unreadable", "unreadable", ""]
    assert len(list(SOURCES["llava"].made_of(settings, listing.shared, listing.items))) == 4


# Shrinking


def test_photos_are_shrunk_where_the_settings_say_so_and_their_boxes_with_them(tmp_path: Path) -> None:
    files = {"large.jpg": jpeg(400, wide=600), "small.jpg": jpeg(90)}
    settings = coco(tmp_path / "data", files)
    in_folder(tmp_path / "data", "images", files)
    boxes = {
        "images": [{"id": 0, "file_name": "large.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [60, 40, 300, 200]}],
    }
    (tmp_path / "data" / "annotations" / "instances.json").write_text(json.dumps(boxes))
    large, small = found(settings.model_copy(update={"resize": 100}))
    assert (large.row["width"], large.row["height"]) == decode(large.row["image"]["bytes"]).size == (150, 100)
    assert large.row["objects"] == [{"category": "cat", "bbox": pytest.approx([15, 10, 75, 50])}]
    assert large.counts == ("photos/resized",)
    assert small.row["image"]["bytes"] == files["small.jpg"]
    assert small.counts == ()
