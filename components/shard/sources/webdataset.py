"""Source `webdataset`: tar files of samples, as webdataset and img2dataset write them; or img2dataset's Parquet.

A sample is a run of neighbouring members whose names are alike up to the first dot: a picture (`.jpg`, `.png`,
`.webp`, `.gif`, `.bmp`), its caption in `.txt`, or in `.json` under "caption". Other members are passed over.

A tar is read from front to back in one task and never cut, whatever `shard.rows_per_shard` says, since it has no table
of contents; small ones share a shard, by a guess of how many samples each holds. One that is damaged gives what stands
before the damage, and one refused sample that says how much was not read. Where no tar lies in the folder, Parquet
files with a column `jpg`, `png` or `webp` are read.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from components.contract.store import Store
from components.shard.source_settings import SourceSettings
from components.shard.sources import parquet
from components.shard.sources.base import (
    DataSource,
    Listing,
    Loaded,
    Outcome,
    RefusedSample,
    ahead,
    files_of,
    mark,
    open_data,
    plain,
    split_by_bytes,
)
from components.shard.sources.columns import Columns
from components.shard.sources.json_stream import parse
from components.shard.sources.photos import admit, resized
from components.shard.sources.record_index import File
from components.shard.sources.tars import Stream, reading
from llava.data.schema import Row
from llava.errors import RefusedInput

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXTS = ("txt", "json")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LONGEST_TEXT = 2**20  # bytes of a .txt or .json
_LOOK = 4 * 2**20  # bytes of a tar that are looked at to guess how many samples it holds


class Raw(NamedTuple):
    """The members of a sample that count, by suffix; `fault`: reason and text of the first that is refused."""

    name: str
    members: dict[str, bytes]
    fault: tuple[str, str] | None = None


def check(settings: SourceSettings) -> Columns | None:
    """None for tars, else the Parquet files' columns; RefusedInput where there is neither."""
    store = open_data(settings)
    if _tars(store, settings):
        return None
    keys = parquet.keys_of(store, settings, ".parquet")
    return _columns(store, keys)


def listing(settings: SourceSettings) -> Listing:
    """The tars with a guess of how many samples each holds; or the row groups of the Parquet files."""
    store = open_data(settings)
    if keys := _tars(store, settings):
        files = [File.at(store, key) for key in keys]
        first = max(files, key=lambda file: file.size)
        size = max(1, _bytes_of_a_sample(first))
        marks = np.array([mark(file.key) for file in files], np.uint64)
        sizes = [max(1, file.size // size) for file in files]
        refused = [one for one in store.refused() if _is_tar(one.key, settings)]
        return Listing(files, sizes=sizes, exact=False, marks=marks, refused=refused)
    named = parquet.keys_of(store, settings, ".parquet")
    keys = [key for key in named if _has_pictures(store, key)]
    return parquet.list_groups(settings, store, keys, _columns(store, keys))


def rows(
    settings: SourceSettings, shared: tuple[Store, Columns] | None, items: Sequence[Any], kept: Store
) -> Iterator[Outcome]:
    """The samples of the tars, in their order."""
    if shared is not None:
        yield from parquet.rows(settings, shared, items, kept)
        return
    for file in items:
        yield from ahead(lambda raw: _load(settings, raw), samples(file, settings.max_image_bytes))


def samples(file: File, longest: int) -> Iterator[Raw]:
    """The samples of one tar; pictures over `longest` bytes are not read into memory."""
    stream = Stream(file)
    current: Raw | None = None
    damage = None
    try:
        with reading(stream, file.size) as members:
            for archive, info in members:
                if info.isdir():
                    continue
                name, suffix = _split(info.name)
                if current is None or name != current.name:
                    if current is not None:
                        yield current
                    current = Raw(name, {})
                if suffix in PICTURES + TEXTS and current.fault is None:
                    current = _with(current, archive, info, suffix, longest)
    except (tarfile.TarError, EOFError) as error:
        damage = f"{file}: damaged after about {stream.taken:,} of {file.size:,} bytes, not read any further: {error}"
    if current is not None:
        yield current
    if damage is not None:
        yield Raw(f"{file.key}: the rest", {}, ("broken-tar", damage))


def _with(raw: Raw, archive: tarfile.TarFile, info: tarfile.TarInfo, suffix: str, longest: int) -> Raw:
    """The sample with one more member, or with the reason why not."""
    most = longest if suffix in PICTURES else _LONGEST_TEXT
    reason = None
    if not info.isreg() or info.issparse():
        reason = "link"
    elif info.size > most:
        reason = "too-many-bytes" if suffix in PICTURES else "text-too-long"
    elif suffix in raw.members:
        reason = "member-twice"
    elif suffix in PICTURES and not raw.members.keys().isdisjoint(PICTURES):
        reason = "several-images"
    if reason is not None:
        return raw._replace(members={}, fault=(reason, f"{info.name} of {info.size:,} bytes: {reason}"))
    opened = archive.extractfile(info)
    assert opened is not None
    return raw._replace(members={**raw.members, suffix: opened.read()})


def _load(settings: SourceSettings, raw: Raw) -> Loaded:
    if raw.fault is not None:
        raise RefusedSample(raw.name, *raw.fault)
    found = [suffix for suffix in PICTURES if suffix in raw.members]
    if len(found) != 1:
        reason = "several-images" if found else "image-missing"
        raise RefusedSample(
            raw.name, reason, f"the sample has {len(found)} pictures ({', '.join(raw.members)})"
        )
    caption = plain(_caption(raw))
    if not caption:
        raise RefusedSample(raw.name, "no-caption", "the sample has no caption in .txt or .json")
    data = raw.members[found[0]]
    photo = admit(settings, raw.name, f"{raw.name}.{found[0]}", data)
    row: Row = {
        "id": raw.name,
        "image": photo.image,
        "width": photo.size.width,
        "height": photo.size.height,
        "captions": [caption],
    }
    return Loaded(split_by_bytes(settings, data), row, resized(photo))


def _caption(raw: Raw) -> str:
    if "txt" in raw.members:
        return raw.members["txt"].decode("utf-8", "surrogateescape")
    if "json" not in raw.members:
        return ""
    try:
        value = parse(raw.members["json"])
    except ValueError as error:
        raise RefusedSample(raw.name, "no-json", f"the sample's .json is not valid: {error}") from None
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption if isinstance(caption, str) else ""


def _split(member: str) -> tuple[str, str]:
    """The sample's name and the suffix in small letters: webdataset cuts at the first dot of the file's name."""
    path = PurePosixPath(member)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower()


def _bytes_of_a_sample(file: File) -> int:
    """A guess, from the beginning of the tar."""
    seen, stream = set(), Stream(file)
    with suppress(tarfile.TarError, EOFError), reading(stream, file.size) as members:
        for _, info in members:
            seen.add(_split(info.name)[0])
            if stream.taken >= _LOOK:
                break
    return stream.taken // max(1, len(seen))


def _tars(store: Store, settings: SourceSettings) -> list[str]:
    """The tars that `shard.files` chooses, else all."""
    return [entry.key for entry in store.list() if _is_tar(entry.key, settings)]


def _is_tar(key: str, settings: SourceSettings) -> bool:
    return key.endswith(SUFFIXES) and (settings.files is None or fnmatch(key, settings.files))


def _has_pictures(store: Store, key: str) -> bool:
    with parquet.opened(store, key) as file:
        return not {*PICTURES}.isdisjoint(file.schema_arrow.names)


def _columns(store: Store, keys: list[str]) -> Columns:
    """img2dataset's columns, from the first file that has pictures; its tables without them say what failed."""
    for key in keys:
        with parquet.opened(store, key) as file:
            names = file.schema_arrow.names
        if pictures := [name for name in PICTURES if name in names]:
            if "caption" not in names:
                raise RefusedInput(
                    f"{store.uri}/{key}: no column 'caption'; shard.source=parquet takes any columns"
                )
            return Columns((pictures[0],), ("caption",), None, "key" if "key" in names else None)
    raise RefusedInput(
        f"shard.path={store.uri}: neither a .tar nor a Parquet file with a column {', '.join(PICTURES[:4])}"
    )


def made_of(
    settings: SourceSettings, shared: tuple[Store, Columns] | None, items: Sequence[Any]
) -> Iterable[object]:
    """The tars with their versions, or the row groups."""
    if shared is not None:
        return parquet.made_of(settings, shared, items)
    return [(file.key, file.size, file.version) for file in items]


SOURCE = DataSource(
    files_of,
    check,
    listing,
    rows,
    made_of,
    about="tars of jpg + txt + json, or img2dataset's Parquet",
    takes=("files",),
)
