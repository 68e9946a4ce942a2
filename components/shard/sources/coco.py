"""Source `coco`: photos with COCO captions and, where there are any, COCO boxes.

Read in COCO's own layout (`annotations/captions_train2017.json`, `annotations/instances_train2017.json`,
`train2017/`) or with plain names (`annotations/captions.json`, `annotations/instances.json`, `images/`).
A photo that the boxes file does not list has unknown boxes; one that it lists without boxes has none.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from components.contract.store import Store
from components.shard.settings import ShardSettings
from components.shard.sources.base import (
    Listing,
    Loaded,
    Place,
    RefusedSample,
    Source,
    files_of,
    image_folder,
    open_data,
    plain,
    read_json,
    read_photo,
    split_by_hash,
)
from llava.data.schema import ObjectCell, Row
from llava.errors import RefusedInput

Box = tuple[str, tuple[float, float, float, float]]


class Photo(NamedTuple):
    """One photo of the captions file. `objects` None: unknown; a box is x, y, w, h in pixels."""

    name: str
    file: str
    captions: tuple[str, ...]
    objects: tuple[Box, ...] | None


class Files(NamedTuple):
    """Keys of the captions file and of the boxes file, if there is one."""

    store: Store
    captions: str
    instances: str | None


def locate(settings: ShardSettings) -> Files:
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
                    f"shard.path={settings.path}: which captions file? annotations/ holds {found}; "
                    "name it in shard.captions"
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


def listing(settings: ShardSettings) -> Listing:
    """Every photo of the captions file, in the order of the file names."""
    store, captions, instances = locate(settings)
    counts: Counter[str] = Counter()
    boxes = _boxes(store, instances, counts) if instances else {}
    photos = _photos(store, captions, boxes)
    listed = {photo.name: photo for photo in photos}
    if len(listed) < len(photos):
        counts["photos-listed-twice"] = len(photos) - len(listed)
    suffix = PurePosixPath(captions).stem.removeprefix("captions").lstrip("_")
    folder = image_folder(store, settings, *([suffix] if suffix else []))
    return Listing([listed[name] for name in sorted(listed)], Place(store, folder), dict(counts))


def load(settings: ShardSettings, place: Place, photo: Photo) -> Loaded:
    """Read the photo and give its row; one without a caption has nothing to learn from."""
    if not photo.captions:
        raise RefusedSample(photo.name, "no-caption", f"{photo.file} has no caption")
    image, size = read_photo(settings, place, photo.name, photo.file)
    # Boxes were drawn on the pixels as stored, or on the upright picture: for a turned photo nobody can tell.
    turned = photo.objects is not None and size.orientation != 1
    objects: list[ObjectCell] | None = None
    if photo.objects is not None and not turned:
        objects = [{"category": category, "bbox": list(box)} for category, box in photo.objects]
    row: Row = {
        "id": photo.name,
        "image": image,
        "width": size.width,
        "height": size.height,
        "captions": list(photo.captions),
        "objects": objects,
    }
    split = split_by_hash(settings, photo.name)
    return Loaded(split, row, ("boxes-left-out/photos-turned-by-exif",) if turned else ())


def _photos(store: Store, key: str, boxes: Mapping[int, tuple[Box, ...]]) -> list[Photo]:
    with _entries_of(store, key):
        table = _coco(store, key, "images", "annotations")
        captions: dict[int, list[str]] = defaultdict(list)
        for note in table["annotations"]:
            if text := plain(note["caption"]):
                captions[note["image_id"]].append(text)
        return [
            Photo(
                str(PurePosixPath(image["file_name"]).with_suffix("")),
                image["file_name"],
                tuple(captions[image["id"]]),
                boxes.get(image["id"]),
            )
            for image in table["images"]
        ]


def _boxes(store: Store, key: str, counts: Counter[str]) -> Mapping[int, tuple[Box, ...]]:
    """Boxes of every photo that the file lists; what is no single object is left out and counted."""
    with _entries_of(store, key):
        table = _coco(store, key, "images", "annotations", "categories")
        categories = {category["id"]: category["name"] for category in table["categories"]}
        boxes: dict[int, list[Box]] = {image["id"]: [] for image in table["images"]}
        for note in table["annotations"]:
            box = tuple(float(side) for side in note["bbox"])
            if note.get("iscrowd"):
                counts["boxes-left-out/crowd"] += 1
            elif len(box) != 4 or not all(map(math.isfinite, box)) or box[2] <= 0 or box[3] <= 0:
                counts["boxes-left-out/no-area"] += 1
            elif note["category_id"] not in categories or note["image_id"] not in boxes:
                counts["boxes-left-out/unknown-category-or-image"] += 1
            else:
                boxes[note["image_id"]].append((categories[note["category_id"]], box))
    return {image: tuple(found) for image, found in boxes.items()}


def _coco(store: Store, key: str, *lists: str) -> dict[str, Any]:
    table = read_json(store, key)
    missing = [name for name in lists if not isinstance(table, dict) or not isinstance(table.get(name), list)]
    if missing:
        raise RefusedInput(
            f"{store.uri}/{key} is no COCO file: it has no list {' and no list '.join(missing)}"
        )
    return table


@contextmanager
def _entries_of(store: Store, key: str) -> Iterator[None]:
    """Turn a malformed entry into a RefusedInput that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"an entry without {error}" if isinstance(error, KeyError) else str(error)
        raise RefusedInput(f"{store.uri}/{key} is no COCO file: {what}") from error


SOURCE = Source(files_of, locate, listing, load)
