"""Source `parquet`: Hugging Face datasets, or any Parquet files with pictures in a column.

| column | may be |
|---|---|
| `shard.image_columns` | `Image` (bytes and path), plain bytes, or a list of either; several pictures a row |
| `shard.texts` | a text: a caption; a list of texts: captions; a list of {from, value}: the conversation |
| `shard.id_column` | a text or a whole number |

A picture must be inside the file: a path without bytes is refused, and never opened. The driver reads the footers
only; a task takes row groups and reads them a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.contract.store import RefusedFile, Store
from components.shard.source_settings import SourceSettings
from components.shard.sources.base import (
    DataSource,
    Listing,
    Loaded,
    Outcome,
    RefusedSample,
    ahead,
    files_of,
    left_out,
    mark,
    open_data,
    plain,
    split_by_bytes,
    split_by_hash,
)
from components.shard.sources.columns import Columns, columns_of
from components.shard.sources.llava import check_slots, turns_of
from components.shard.sources.photos import admit, resized
from components.shard.sources.tars import most_unpacked
from llava.data.parquet_files import damage_told, open_parquet
from llava.data.schema import Row
from llava.errors import RefusedInput

_ROWS_AT_ONCE = 16
_FOOTERS_AT_ONCE = 16


class Group(NamedTuple):
    """One row group; `first`: number of its first row in the file."""

    key: str
    group: int
    first: int


def check(settings: SourceSettings) -> Columns:
    """The columns of the first file; RefusedInput where one is missing or of no use."""
    store = open_data(settings)
    keys = keys_of(store, settings, ".parquet")
    with opened(store, keys[0]) as file:
        return columns_of(settings, file.schema_arrow, f"{store.uri}/{keys[0]}")


def listing(settings: SourceSettings) -> Listing:
    """The row groups of all files, in the order of their names."""
    store = open_data(settings)
    columns, keys = check(settings), keys_of(store, settings, ".parquet")
    return list_groups(settings, store, keys, columns)


def list_groups(settings: SourceSettings, store: Store, keys: list[str], columns: Columns) -> Listing:
    """The row groups of these files; RefusedInput for a file that is damaged or has other columns."""

    def footer(key: str) -> list[int]:
        with opened(store, key) as file:
            if missing := set(columns.names) - set(file.schema_arrow.names):
                raise RefusedInput(f"{store.uri}/{key}: no column {', '.join(sorted(missing))}")
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        stat = store.stat(key)
        if stat is None or any(not 0 <= count <= most_unpacked(stat.size) for count in counts):
            raise RefusedInput(
                f"{store.uri}/{key} is no Parquet file that can be read: impossible numbers of rows"
            )
        return counts

    items, sizes = [], []
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        for key, counts in zip(keys, pool.map(footer, keys), strict=True):
            first = 0
            for group, count in enumerate(counts):
                items.append(Group(key, group, first))
                sizes.append(count)
                first += count
    marks = np.array([mark(f"{item.key} {item.group}") for item in items], np.uint64)
    pattern = settings.files or "*.parquet"
    refused = [one for one in store.refused() if fnmatch(one.key, pattern)]
    return Listing(items, (store, columns), sizes=sizes, marks=marks, refused=refused)


def rows(
    settings: SourceSettings, shared: tuple[Store, Columns], items: Sequence[Group], kept: Store
) -> Iterator[Outcome]:
    """The rows of the row groups, in their order."""
    store, columns = shared
    for item in items:
        yield from _rows_of(settings, store, columns, item)


def _rows_of(settings: SourceSettings, store: Store, columns: Columns, item: Group) -> Iterator[Outcome]:
    """The rows of one group; from where it is damaged, or unpacks to too much, one refused sample for the rest."""
    key, group, number = item
    rest: tuple[str, str] | None = None
    try:
        with opened(store, key) as file:
            left = _most_bytes(file, group, columns)
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns.names):
                left -= batch.nbytes
                if left < 0:
                    rest = ("bomb", "the rows are far larger than their part of the file")
                    break
                named = [
                    (_name(key, number + n, cells, columns), cells) for n, cells in enumerate(_cells(batch))
                ]
                yield from ahead(lambda one: _load(settings, columns, *one), named)
                number += batch.num_rows
    except RefusedFile as error:
        rest = (error.reason, str(error))
    except RefusedInput as error:
        rest = ("broken-parquet", str(error))
    if rest is not None:
        yield RefusedSample(f"{key}: the rows from {number:,} on", *rest)


def _most_bytes(file: pq.ParquetFile, group: int, columns: Columns) -> int:
    """Bytes to which a row group may unpack; RefusedInput where it announces more."""
    about = file.metadata.row_group(group)
    parts = [about.column(number) for number in range(about.num_columns)]
    mine = [part for part in parts if part.path_in_schema.partition(".")[0] in columns.names]
    most = most_unpacked(sum(part.total_compressed_size for part in mine))
    if (told := sum(part.total_uncompressed_size for part in mine)) > most:
        raise RefusedFile("bomb", f"row group {group} would unpack to {told:,} bytes; limit {most:,}")
    return most


def keys_of(store: Store, settings: SourceSettings, suffix: str) -> list[str]:
    """The files that `shard.files` chooses, else all with the suffix; RefusedInput where there are none."""
    pattern = settings.files or f"*{suffix}"
    keys = [entry.key for entry in store.list() if fnmatch(entry.key, pattern)]
    if not keys:
        raise RefusedInput(
            f"shard.path={store.uri}: no file is named like {pattern}; see shard.files{left_out(store.refused())}"
        )
    return keys


def _load(settings: SourceSettings, columns: Columns, name: str, cells: dict[str, Any] | None) -> Loaded:
    if cells is None:
        raise RefusedSample(name, "text-not-unicode", "a text of the row is no UTF-8")
    pictures = [one for column in columns.images for one in _pictures(name, cells[column])]
    turns = turns_of(name, cells[columns.conversations]) if columns.conversations else []
    captions = [
        text for column in columns.captions for value in _texts(cells[column]) if (text := plain(value))
    ]
    if turns:
        check_slots(name, turns, len(pictures))
    elif not captions:
        raise RefusedSample(name, "no-caption", "the row has no caption")
    elif not pictures:
        raise RefusedSample(name, "image-missing", "the row has no picture")
    row: Row = {"id": name, "captions": captions}
    admitted = [admit(settings, name, path or name, data) for data, path in pictures]
    if turns:
        row["conversations"] = turns
    if admitted:
        first, *more = admitted
        row |= {"image": first.image, "width": first.size.width, "height": first.size.height}
        if more:
            row["more_images"] = [another.image for another in more]
        split = split_by_bytes(settings, pictures[0][0])
    else:
        split = split_by_hash(settings, name)
    return Loaded(split, row, resized(*admitted))


def _pictures(name: str, value: Any) -> list[tuple[bytes, str | None]]:
    found = []
    for cell in value if isinstance(value, list) else [value]:
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path is not None:
            text = f"the picture is only a path, {path!r}: write the data set with its pictures inside"
            raise RefusedSample(name, "path-without-bytes", text)
        if data is not None:
            found.append((data, path))
    return found


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if one is not None]


def _cells(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows as Python values; None for one with a text that is no UTF-8."""
    try:
        return cast(list[dict[str, Any] | None], batch.to_pylist())
    except UnicodeDecodeError:
        return (
            [None]
            if batch.num_rows == 1
            else [cells for row in range(batch.num_rows) for cells in _cells(batch.slice(row, 1))]
        )


def _name(key: str, number: int, cells: dict[str, Any] | None, columns: Columns) -> str:
    value = cells[columns.id] if columns.id and cells else None
    return f"{PurePosixPath(key).stem}-{number}" if value is None else str(value)


@contextmanager
def opened(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    """The file, to read with little memory; RefusedInput where it is none."""
    where = f"{store.uri}/{key}"
    how = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}
    with damage_told(where), store.open(key) as source, open_parquet(source, where, **how) as file:
        yield file


def made_of(
    settings: SourceSettings, shared: tuple[Store, Columns], items: Sequence[Group]
) -> Iterator[object]:
    """The row groups with the versions of their files, and the columns that are read."""
    store, columns = shared
    versions = {key: store.stat(key) for key in dict.fromkeys(group.key for group in items)}
    yield columns
    for group in items:
        yield group, versions[group.key]


SOURCE = DataSource(
    files_of,
    check,
    listing,
    rows,
    made_of,
    about="Hugging Face datasets",
    needs={
        "path": "the folder that holds the data",
        "texts": "the columns that hold the captions or conversations",
    },
    takes=("files", "image_columns", "id_column"),
)
