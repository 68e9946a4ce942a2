"""COCO's annotations with photos in a folder, a zip or a tar of its own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.sources import (
    bytes_of,
    coco,
    in_folder,
    in_tar,
    in_zip,
    photos,
)

# Where photos lie


@pytest.mark.parametrize("put", [in_folder, in_zip, in_tar])
@pytest.mark.parametrize("name", ["images", "train2014"])
def test_cocos_photos_are_read_from_a_folder_a_zip_or_a_tar_of_its_own_names(
    tmp_path: Path, put: Callable[..., None], name: str
) -> None:
    files = {f"COCO_train2014_{number}": data for number, data in photos(5).items()}
    settings = coco(tmp_path / "data", files, "_train2014")
    # COCO's own zips hold a folder of their own name.
    inside = {f"{name}/{path}": data for path, data in files.items()} if put is in_zip else files
    put(tmp_path / "data", name, inside)
    assert bytes_of(settings) == list(files.values())
