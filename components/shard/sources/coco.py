"""Source `coco`: photos with COCO captions and, where there are any, COCO boxes.

Read in COCO's own layout (`annotations/captions_train2017.json`, `annotations/instances_train2017.json`,
`train2017/`) or with plain names (`annotations/captions.json`, `annotations/instances.json`, `images/`).
The photos lie in a folder, in a .zip or .tar (read in place) or under an S3 prefix. Both JSON files are read as
streams: what segmentations they hold is dropped on the way.
A photo that the boxes file does not list has unknown boxes; one that it lists without boxes has none.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from components.contract.store import Store
from components.shard.source_settings import SourceSettings
from components.shard.sources.base import (
    DataSource,
    Listing,
    Loaded,
    RefusedSample,
    each,
    left_out,
    mark,
    open_data,
    plain,
    split_by_hash,
)
from components.shard.sources.json_stream import JsonStream
from components.shard.sources.photos import Photos, external_with_roots, find_photos, read_photo, resized
from llava.data.schema import ObjectCell, Row
from llava.errors import RefusedInput

LabelledBox = tuple[str, tuple[float, float, float, float]]


class Photo(NamedTuple):
    """One photo of the captions file. `objects` None: unknown; a box is x, y, w, h in pixels."""

    name: str
    file: str
    captions: tuple[str, ...]
    objects: tuple[LabelledBox, ...] | None


class Files(NamedTuple):
    """Keys of the captions file and of the boxes file, if there is one."""

    store: Store
    captions: str
    instances: str | None


def locate(settings: SourceSettings) -> Files:
    """Find the two files; RefusedInput that names the setting where that is not possible."""
    store = open_data(settings)
    captions = settings.captions
    if captions is None:
        keys = [entry.key for entry in store.list("annotations/captions") if entry.key.endswith(".json")]
        captions = "annotations/captions.json"
        if captions not in keys:
            if len(keys) != 1:
                found = f"several: {', '.join(keys)}" if keys else "none"
                raise RefusedInput(
                    f"shard.path={settings.path}: which captions file? annotations/ holds {found}"
                    f"{left_out(store.refused())}; name it in shard.captions"
                )
            captions = keys[0]
    path = PurePosixPath(captions)
    beside = str(path.with_name(path.name.replace("captions", "instances", 1)))
    instances = settings.instances
    if instances is None and beside != captions and store.stat(beside) is not None:
        instances = beside
    for name, key in (("captions", captions), ("instances", instances)):
        if key is not None and store.stat(key) is None:
            raise RefusedInput(f"shard.{name}={key}: {store.uri}/{key} does not exist")
    return Files(store, captions, instances)


def listing(settings: SourceSettings) -> Listing:
    """Every photo of the captions file, in the file's order: what is added to it later stands at its end."""
    store, captions, instances = locate(settings)
    counts: Counter[str] = Counter()
    boxes = _boxes(store, instances, counts) if instances else {}
    photos = _photos(store, captions, boxes)
    listed = {photo.name: photo for photo in photos}
    if len(listed) < len(photos):
        counts["photos-listed-twice"] = len(photos) - len(listed)
    suffix = PurePosixPath(captions).stem.removeprefix("captions").lstrip("_")
    places = find_photos(settings, *([suffix] if suffix else []))
    marks = np.fromiter(map(mark, listed), np.uint64, len(listed))
    return Listing(list(listed.values()), places, dict(counts), marks=marks)


def load(settings: SourceSettings, photos: Photos, photo: Photo) -> Loaded:
    """Read the photo and give its row; one without a caption has nothing to learn from."""
    if not photo.captions:
        raise RefusedSample(photo.name, "no-caption", f"{photo.file} has no caption")
    admitted = read_photo(settings, photos, photo.name, photo.file)
    image, size, scale = admitted
    # Boxes were drawn on the pixels as stored, or on the upright picture: for a turned photo nobody can tell.
    turned = photo.objects is not None and size.orientation != 1
    objects: list[ObjectCell] | None = None
    if photo.objects is not None and not turned:
        objects = [
            {"category": category, "bbox": [side * scale for side in box]} for category, box in photo.objects
        ]
    row: Row = {
        "id": photo.name,
        "image": image,
        "width": size.width,
        "height": size.height,
        "captions": list(photo.captions),
        "objects": objects,
    }
    split = split_by_hash(settings, photo.name)
    counts = ("boxes-left-out/photos-turned-by-exif",) if turned else ()
    return Loaded(split, row, (*counts, *resized(admitted)))


def _photos(store: Store, key: str, boxes: Mapping[int, tuple[LabelledBox, ...]]) -> list[Photo]:
    captions: dict[int, list[str]] = defaultdict(list)
    files: list[tuple[str, int]] = []
    with _entries_of(store, key):
        for what, entry in _entries(store, key, "images", "annotations"):
            if what == "images":
                files.append((str(PurePosixPath(entry["file_name"])), entry["id"]))
            elif text := plain(entry["caption"]):
                captions[entry["image_id"]].append(text)
        return [
            Photo(str(PurePosixPath(file).with_suffix("")), file, tuple(captions[image]), boxes.get(image))
            for file, image in files
        ]


def _boxes(store: Store, key: str, counts: Counter[str]) -> Mapping[int, tuple[LabelledBox, ...]]:
    """Boxes of every photo that the file lists; what is no single object is left out and counted."""
    categories: dict[int, str] = {}
    boxes: dict[int, list[LabelledBox]] = {}
    single: list[tuple[int, int, tuple[float, ...]]] = []
    with _entries_of(store, key):
        for what, entry in _entries(store, key, "images", "annotations", "categories"):
            if what == "images":
                boxes[entry["id"]] = []
            elif what == "categories":
                categories[entry["id"]] = entry["name"]
            elif entry.get("iscrowd"):
                counts["boxes-left-out/crowd"] += 1
            else:
                box = tuple(float(side) for side in entry["bbox"])
                single.append((entry["image_id"], entry["category_id"], box))
        for image, category, box in single:
            if len(box) != 4 or not all(map(math.isfinite, box)) or box[2] <= 0 or box[3] <= 0:
                counts["boxes-left-out/no-area"] += 1
            elif category not in categories or image not in boxes:
                counts["boxes-left-out/unknown-category-or-image"] += 1
            else:
                boxes[image].append((categories[category], box))
    return {image: tuple(found) for image, found in boxes.items()}


def _entries(store: Store, key: str, *lists: str) -> Iterator[tuple[str, Any]]:
    """(list, entry) of the lists, in the order of the file; RefusedInput where one is missing."""
    stream = JsonStream(store, key)
    for element in stream:
        if element.key in lists:
            yield element.key, element.value
    missing = [name for name in lists if name not in stream.lists]
    if missing:
        raise RefusedInput(
            f"{store.uri}/{key} is no COCO file: it has no list {' and no list '.join(missing)}"
        )


@contextmanager
def _entries_of(store: Store, key: str) -> Iterator[None]:
    """Turn a malformed entry into a RefusedInput that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"an entry without {error}" if isinstance(error, KeyError) else str(error)
        raise RefusedInput(f"{store.uri}/{key} is no COCO file: {what}") from error


def made_of(settings: SourceSettings, photos: Photos, items: Sequence[Photo]) -> Iterator[object]:
    """What the two files say of each photo, and the version of its file."""
    return zip(items, photos.versions([photo.file for photo in items]), strict=True)


SOURCE = DataSource(
    external_with_roots,
    locate,
    listing,
    each(load),
    made_of,
    about="photos with COCO captions and boxes",
    takes=("roots",),
)
