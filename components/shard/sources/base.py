"""What a source is: it lists its samples cheaply here, and loads one of them wherever a task runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from components.contract.digest import fingerprint
from components.contract.store import Store, check_key, open_store
from components.shard.settings import ShardSettings
from llava.data.images import BadImage, Size, decode, read_size
from llava.data.schema import ImageCell, Row
from llava.errors import LlavaError, RefusedInput


class RefusedSample(LlavaError):
    """A sample that is left out: its `name`, a short `reason` to count by, and the text for people."""

    def __init__(self, name: str, reason: str, text: str) -> None:
        super().__init__(text)
        self.name, self.reason = name, reason


@dataclass
class Listing:
    """The samples of a source in a fixed order, without their pixels; what `Source.load` takes, one by one.

    `counts` tells what the list itself left out (boxes of crowds, say), `place` what all samples share.
    """

    items: Sequence[Any]
    place: Any = None
    counts: dict[str, int] = field(default_factory=dict)


class Loaded(NamedTuple):
    """A sample with its pixels: the split, the row, and names of what is to be counted about it."""

    split: str
    row: Row
    counts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Four functions.

    `external` gives fingerprints; `check` raises RefusedInput, cheaply, where the data's files are not found;
    `listing` lists the samples; `load(settings, place, item)` loads one or raises RefusedSample.
    """

    external: Callable[[ShardSettings], dict[str, str]]
    check: Callable[[ShardSettings], Any]
    listing: Callable[[ShardSettings], Listing]
    load: Callable[[ShardSettings, Any, Any], Loaded]


class Place(NamedTuple):
    """Where the photos lie: the data folder, and the prefix of the keys inside it."""

    store: Store
    folder: str


def open_data(settings: ShardSettings) -> Store:
    """The data folder; RefusedInput where nothing lies there."""
    assert settings.path is not None
    store = open_store(settings.path)
    here = store.local_path
    if not here.is_dir() if here is not None else next(store.list(), None) is None:
        raise RefusedInput(f"shard.path={settings.path}: no such folder ({store.uri})")
    return store


def files_of(settings: ShardSettings) -> dict[str, str]:
    """The fingerprint of the data folder."""
    return {settings.source: fingerprint(open_data(settings).uri)}


def read_json(store: Store, key: str) -> Any:
    """A JSON file of the data folder; .jsonl is a list with one value a line. Raises RefusedInput."""
    try:
        data = store.read(key)
        if key.endswith(".jsonl"):
            return [json.loads(line) for line in data.splitlines() if line.strip()]
        return json.loads(data)
    except FileNotFoundError:
        raise RefusedInput(f"{store.uri}/{key} does not exist") from None
    except ValueError as error:
        raise RefusedInput(f"{store.uri}/{key} is not valid JSON: {error}") from None


def image_folder(store: Store, settings: ShardSettings, *also: str) -> str:
    """The photos' folder as a prefix of keys: the setting, or the first that exists of images/ and `also`."""
    if settings.images is not None:
        return settings.images.rstrip("/") + "/"
    for folder in ("images/", *(f"{name}/" for name in also)):
        if next(store.list(folder), None) is not None:
            return folder
    return ""


def read_photo(settings: ShardSettings, place: Place, name: str, path: str) -> tuple[ImageCell, Size]:
    """The photo `path` of sample `name`: its bytes as they are, and its size; decoded, to prove it whole."""
    try:
        key = check_key(place.folder + path)
    except RefusedInput:
        text = f"image path {path!r} is not a relative path inside the data folder"
        raise RefusedSample(name, "image-path", text) from None
    try:
        found = place.store.stat(key)
        if found is None:
            raise FileNotFoundError
        if found.size > settings.max_image_bytes:
            text = f"{key} has {found.size:,} bytes; limit {settings.max_image_bytes:,}"
            raise RefusedSample(name, "too-many-bytes", text)
        data = place.store.read(key)
    except FileNotFoundError:
        raise RefusedSample(name, "image-missing", f"{place.store.uri}/{key} does not exist") from None
    try:
        size = read_size(data, settings.limits)
        decode(data, settings.limits)
    except BadImage as error:
        raise RefusedSample(name, error.reason, f"{key}: {error}") from None
    return {"bytes": data, "path": PurePosixPath(path).name}, size


def split_by_hash(settings: ShardSettings, name: str) -> str:
    """The split of a photo, from its name and the seed alone: more data later never moves it."""
    digest = hashlib.sha256(f"{settings.seed}:{name}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < settings.heldout else "train"


def plain(text: str) -> str:
    """The text on one line, with single spaces."""
    return " ".join(text.split())
