"""Source `llava`: the ecosystem's list of {"id", "image", "conversations"}, as JSON or one record a line.

The file may be of any size: it is read once as a stream, which notes where each record lies, and the tasks read
their own records. Records that share their first photo stand together, so that a file stores it once.

"image" names one photo, a list of them, or is left out. Turns alternate, a human first and an answer last. A
record with one photo holds one `<image>` in its first human turn, which is the picture's place; `<image>`
anywhere else is ordinary text. With several photos the human turns hold exactly as many `<image>`, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from components.contract.store import Store
from components.shard.source_settings import SourceSettings
from components.shard.sources.base import (
    NEVER,
    DataSource,
    Listing,
    Loaded,
    RefusedSample,
    each,
    mark,
    one_file,
    open_data,
    split_by_hash,
)
from components.shard.sources.json_stream import JsonStream, parse
from components.shard.sources.photos import Photos, external_with_roots, find_photos, read_photo, resized
from components.shard.sources.record_index import File, RecordIndex, lines
from llava.data.schema import Row, TurnCell
from llava.errors import RefusedInput

SLOT = "<image>"
ROLES = ("human", "gpt")


def listing(settings: SourceSettings) -> Listing:
    """The records, each with its number; in the order of the file, but those of one photo behind its first."""
    file = File.at(*locate(settings))
    records, images = _json_lines(file) if file.key.endswith(".jsonl") else _json_list(file)
    chosen, marks = _together(records, images)
    return Listing(chosen, find_photos(settings), marks=marks)


def locate(settings: SourceSettings) -> tuple[Store, str]:
    """The data folder and the conversations file in it; RefusedInput where there is none, or several."""
    store = open_data(settings)
    return store, one_file(store, "conversations", settings.conversations, ".json", ".jsonl")


def load(settings: SourceSettings, photos: Photos, item: tuple[int, bytes]) -> Loaded:
    """Check the record, read its photos and give its row. All records of one (first) photo fall into one split."""
    number, data = item
    try:
        record = parse(data)
    except ValueError as error:
        raise RefusedSample(f"record {number}", "no-json", f"the entry is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise RefusedSample(f"record {number}", "no-record", "the entry is no JSON object")
    name = f"record {number}" if record.get("id") is None else str(record["id"])
    paths = _image_paths(name, record.get("image"))
    turns = turns_of(name, record.get("conversations"))
    check_slots(name, turns, len(paths))
    row: Row = {"id": name, "conversations": turns}
    admitted = [read_photo(settings, photos, name, path) for path in paths]
    if admitted:
        first, *more = admitted
        row |= {"image": first.image, "width": first.size.width, "height": first.size.height}
        if more:
            row["more_images"] = [another.image for another in more]
    return Loaded(split_by_hash(settings, paths[0] if paths else name), row, resized(*admitted))


def turns_of(name: str, value: Any) -> list[TurnCell]:
    """A list of {"from", "value"} with alternating roles, an answer last; RefusedSample."""
    if not isinstance(value, list) or not value:
        raise RefusedSample(name, "no-turns", "the record has no list of conversations")
    turns: list[TurnCell] = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RefusedSample(name, "turn", f"turn {number} is no object with a text as its value")
        if turn.get("from") != ROLES[number % 2]:
            text = f"turn {number} is from {turn.get('from')!r}, expected {ROLES[number % 2]!r}"
            raise RefusedSample(name, "roles", text)
        turns.append({"from": turn["from"], "value": turn["value"]})
    if len(turns) % 2:
        raise RefusedSample(name, "roles", "the last turn is a question without an answer")
    return turns


def check_slots(name: str, turns: list[TurnCell], images: int) -> None:
    """RefusedSample unless the human turns hold one `<image>` per picture, where they must."""
    first = turns[0]["value"].count(SLOT)
    if not images and first:
        raise RefusedSample(
            name, "slot-without-image", f"the first turn has {SLOT}, the record names no image"
        )
    if images == 1 and first != 1:
        raise RefusedSample(name, "slots", f"the first turn must have one {SLOT}, it has {first}")
    everywhere = sum(turn["value"].count(SLOT) for turn in turns if turn["from"] == "human")
    if images > 1 and everywhere != images:
        text = f"the record names {images} images, its human turns have {everywhere} {SLOT}"
        raise RefusedSample(name, "slots", text)


def _image_paths(name: str, value: Any) -> list[str]:
    paths = value if isinstance(value, list) else [] if value is None else [value]
    for path in paths:
        if not isinstance(path, str):
            raise RefusedSample(name, "image-path", f"image must be a path, not {type(path).__name__}")
    return paths


def _first_image(record: Any) -> str | None:
    """What the record names as its first picture; nothing is checked yet."""
    if isinstance(record, bytes):
        try:
            record = parse(record)
        except ValueError:
            return None
    value = record.get("image") if isinstance(record, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def _json_lines(file: File) -> tuple[RecordIndex, list[str | None]]:
    records = lines(file)
    return records, [_first_image(data) for _, data in records]


def _json_list(file: File) -> tuple[RecordIndex, list[str | None]]:
    stream = JsonStream(file.store, file.key)
    places, images = [], []
    for element, value, start, size in stream:
        if element == "":
            places.append((start, size))
            images.append(_first_image(value))
    if "" not in stream.lists:
        raise RefusedInput(f"{file} is no list of conversations")
    starts, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return RecordIndex(file, np.arange(len(places)), starts, sizes), images


def _together(records: RecordIndex, images: list[str | None]) -> tuple[RecordIndex, np.ndarray]:
    """The records with those of one picture behind its first, and their marks: no shard begins inside a picture."""
    firsts: dict[int, int] = {}
    order, marks = np.arange(len(records)), np.empty(len(records), np.uint64)
    for number, image in enumerate(images):
        # Texts alone have no name before they are read again: their length has to do.
        marks[number] = mark(image if image is not None else str(records.sizes[number]))
        if image is not None:
            order[number] = firsts.setdefault(hash(image), number)
            if order[number] != number:
                marks[number] = NEVER
    chosen = np.argsort(order, kind="stable")
    parts = (records.numbers[chosen], records.starts[chosen], records.sizes[chosen])
    return RecordIndex(records.file, *parts), marks[chosen]


def made_of(settings: SourceSettings, photos: Photos, items: Sequence[tuple[int, bytes]]) -> Iterator[object]:
    """The records, with their numbers where they have no name, and the versions of their photos' files."""
    records, paths, counts = [], [], []
    for number, data in items:
        name, images = _name_and_images(data)
        records.append((data, number if name is None else None))
        paths += images
        counts.append(len(images))
    versions = iter(photos.versions(paths))
    for record, count in zip(records, counts, strict=True):
        yield record, [next(versions) for _ in range(count)]


def _name_and_images(data: bytes) -> tuple[str | None, list[str]]:
    """As far as the record tells; nothing is checked."""
    try:
        record = parse(data)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return None, []
    value = record.get("image")
    paths = value if isinstance(value, list) else [value]
    name = record.get("id")
    return None if name is None else str(name), [path for path in paths if isinstance(path, str)]


SOURCE = DataSource(
    external_with_roots,
    locate,
    listing,
    each(load),
    made_of,
    about="the ecosystem's JSON of conversations with its photos",
    takes=("roots",),
)
