"""Rows of Parquet files by (row group, row), read a row group at a time, ahead of time, and kept for a while.

A row group is one ranged read of the columns that are wanted (two where others lie between them), on S3 as in a
folder. Files are opened once, in parallel, for their footers; after that a read costs one request.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from llava.data.parquet_files import damage_told, open_parquet
from llava.data.schema import check_schema
from llava.errors import RefusedInput

_FOOTERS_AT_ONCE = 16
_READS_AT_ONCE = 4
_OPEN_FILES = 64


class Rows(Protocol):
    """What scanning and collating need of a dataset, be it one or several."""

    @property
    def weights(self) -> np.ndarray:
        """(G,) times that the samples of each row group are seen in an epoch."""
        ...

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group; `columns` other than the reader's own are read afresh."""
        ...

    def row(self, group: int, row: int) -> dict[str, Any]:
        """One row as Python values."""
        ...

    def prefetch(self, groups: Collection[int]) -> None:
        """Begin to read row groups that will be wanted; returns at once."""
        ...

    def keep_only(self, groups: Collection[int]) -> None:
        """Forget the row groups that are not among `groups`."""
        ...


class ParquetRows:
    """All row groups of `paths`, numbered through in the order of the paths."""

    def __init__(
        self, filesystem: fs.FileSystem, paths: Sequence[str], columns: Sequence[str], keep_groups: int = 128
    ):
        """`columns` that a file does not have are left out; `keep_groups`: row groups held in memory."""
        self.filesystem = filesystem
        self.columns = list(columns)
        self.groups: list[tuple[str, int, int]] = []
        """(path, row group within the file, rows)."""
        self._keep = keep_groups
        self._cache: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._open: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._lock = Lock()
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            self._footers = dict(zip(paths, pool.map(self._footer, paths), strict=True))
        for path, footer in self._footers.items():
            check_schema(footer.schema.to_arrow_schema(), columns, path)
            self.groups += [
                (path, index, footer.row_group(index).num_rows) for index in range(footer.num_row_groups)
            ]
        if not self.groups:
            raise RefusedInput("the dataset has no rows: no Parquet file with a row group among its files")

    @property
    def weights(self) -> np.ndarray:
        """(G,) ones: every sample once in an epoch."""
        return np.ones(len(self.groups))

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group; `columns` other than the reader's own are read afresh."""
        if columns is not None:
            return self._read(group, columns)
        try:
            return self._reading(group).result()
        except BaseException:
            with self._lock:
                self._cache.pop(group, None)  # the next call tries again
            raise

    def prefetch(self, groups: Collection[int]) -> None:
        """Begin to read row groups that will be wanted; returns at once."""
        for group in groups:
            self._reading(group)

    def row(self, group: int, row: int) -> dict[str, Any]:
        """One row as Python values."""
        values: dict[str, Any] = self.table(group).slice(row, 1).to_pylist()[0]
        return values

    def keep_only(self, groups: Collection[int]) -> None:
        """Forget the row groups that are not among `groups`."""
        with self._lock:
            for group in self._cache.keys() - set(groups):
                self._cache.pop(group).cancel()

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        path, index, _ = self.groups[group]
        # A ParquetFile serves one thread; with the footer at hand making one costs nothing.
        file = open_parquet(self._source(path), path, metadata=self._footers[path], pre_buffer=True)
        there = [one for one in columns if one.partition(".")[0] in file.schema_arrow.names]
        with damage_told(path):
            return file.read_row_group(index, columns=there, use_threads=False)

    def _reading(self, group: int) -> Future[pa.Table]:
        with self._lock:
            if group not in self._cache:
                self._cache[group] = self._readers.submit(self._read, group, self.columns)
            self._cache.move_to_end(group)
            found = self._cache[group]
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
            return found

    def _source(self, path: str) -> pa.NativeFile:
        """The file, open: on S3 every opening is a request of its own."""
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        source = self.filesystem.open_input_file(path)
        with self._lock:
            self._open[path] = source
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)  # closed once no thread reads it
        return source

    def _footer(self, path: str) -> pq.FileMetaData:
        with self.filesystem.open_input_file(path) as source:
            return open_parquet(source, path).metadata

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READS_AT_ONCE, "read")


class Mixture:
    """Several datasets as one: their row groups one after the other, each dataset with its weight."""

    def __init__(self, parts: Sequence[tuple[Rows, float]]):
        """`parts`: rows, and how often each of their samples is seen in an epoch (0.5: every other one)."""
        self._parts = [rows for rows, _ in parts]
        self._weights = np.concatenate([rows.weights * weight for rows, weight in parts])
        self._starts = np.cumsum([0, *(len(rows.weights) for rows in self._parts)]).tolist()

    @property
    def weights(self) -> np.ndarray:
        """(G,) of all row groups."""
        return self._weights

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group of the dataset that it belongs to."""
        part = self._part(group)
        return self._parts[part].table(group - self._starts[part], columns)

    def row(self, group: int, row: int) -> dict[str, Any]:
        """One row as Python values."""
        part = self._part(group)
        return self._parts[part].row(group - self._starts[part], row)

    def prefetch(self, groups: Collection[int]) -> None:
        """Begin to read row groups that will be wanted; returns at once."""
        for part, rows in enumerate(self._parts):
            rows.prefetch(self._of(part, groups))

    def keep_only(self, groups: Collection[int]) -> None:
        """Forget the row groups that are not among `groups`."""
        for part, rows in enumerate(self._parts):
            rows.keep_only(self._of(part, groups))

    def _of(self, part: int, groups: Collection[int]) -> list[int]:
        return [group - self._starts[part] for group in groups if self._part(group) == part]

    def _part(self, group: int) -> int:
        return bisect_right(self._starts, group) - 1
