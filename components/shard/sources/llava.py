"""Source `llava`: the ecosystem's list of {"id", "image", "conversations"}, as JSON or one record a line.

A record has one photo or none. Turns alternate, a human first and an answer last. A record with a photo holds
one `<image>` in its first human turn, which is the picture's place; `<image>` anywhere else is ordinary text.
"""

from __future__ import annotations

from typing import Any

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
    read_json,
    read_photo,
    split_by_hash,
)
from llava.data.schema import Row, TurnCell
from llava.errors import RefusedInput

SLOT = "<image>"
ROLES = ("human", "gpt")


def listing(settings: ShardSettings) -> Listing:
    """The records in the order of the file, each with its number."""
    store, key = locate(settings)
    records = read_json(store, key)
    if not isinstance(records, list):
        raise RefusedInput(f"{store.uri}/{key} is no list of conversations")
    return Listing(list(enumerate(records)), Place(store, image_folder(store, settings)))


def locate(settings: ShardSettings) -> tuple[Store, str]:
    """The data folder and the conversations file in it; RefusedInput where there is none, or several."""
    store = open_data(settings)
    key = settings.conversations
    if key is None:
        suffixes = (".json", ".jsonl")
        keys = [e.key for e in store.list() if "/" not in e.key and e.key.endswith(suffixes)]
        if len(keys) != 1:
            found = f"it holds several: {', '.join(keys)}" if keys else "it holds none"
            raise RefusedInput(
                f"shard.path={settings.path}: which conversations file? {found}; name it in shard.conversations"
            )
        key = keys[0]
    if store.stat(key) is None:
        raise RefusedInput(f"shard.conversations={key}: {store.uri}/{key} does not exist")
    return store, key


def load(settings: ShardSettings, place: Place, item: tuple[int, Any]) -> Loaded:
    """Check the record, read its photo and give its row. All records of one photo fall into one split."""
    number, record = item
    if not isinstance(record, dict):
        raise RefusedSample(f"record {number}", "no-record", "the entry is no JSON object")
    name = str(record.get("id", f"record {number}"))
    path = _image_path(name, record.get("image"))
    turns = _turns(name, record.get("conversations"))
    slots = turns[0]["value"].count(SLOT)
    if path is None and slots:
        raise RefusedSample(
            name, "slot-without-image", f"the first turn has {SLOT}, the record names no image"
        )
    if path is not None and slots != 1:
        raise RefusedSample(name, "slots", f"the first turn must have one {SLOT}, it has {slots}")
    row: Row = {"id": name, "conversations": turns}
    if path is not None:
        image, size = read_photo(settings, place, name, path)
        row |= {"image": image, "width": size.width, "height": size.height}
    return Loaded(split_by_hash(settings, path or name), row)


def _image_path(name: str, value: Any) -> str | None:
    if isinstance(value, list):
        if len(value) > 1:
            raise RefusedSample(
                name, "several-images", f"the record names {len(value)} images; one is supported"
            )
        value = value[0] if value else None
    if value is not None and not isinstance(value, str):
        raise RefusedSample(name, "image-path", f"image must be a path, not {type(value).__name__}")
    return value


def _turns(name: str, value: Any) -> list[TurnCell]:
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


SOURCE = Source(files_of, locate, listing, load)
