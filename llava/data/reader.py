"""Rows of Parquet files by (row group, row), read a row group at a time and kept for a while."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from llava.data.schema import check_schema
from llava.errors import RefusedInput


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
        self._files: dict[str, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = Lock()
        for path in paths:
            file = self._file(path)
            check_schema(file.schema_arrow, columns, path)
            self.groups += [
                (path, index, file.metadata.row_group(index).num_rows)
                for index in range(file.metadata.num_row_groups)
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
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            table = self._read(group, self.columns)
            self._cache[group] = table
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
            return table

    def row(self, group: int, row: int) -> dict[str, Any]:
        """One row as Python values."""
        return self.table(group).slice(row, 1).to_pylist()[0]

    def keep_only(self, groups: Collection[int]) -> None:
        """Forget the row groups that are not among `groups`."""
        with self._lock:
            for group in self._cache.keys() - set(groups):
                del self._cache[group]

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        path, index, _ = self.groups[group]
        file = self._file(path)
        there = [one for one in columns if one.partition(".")[0] in file.schema_arrow.names]
        return file.read_row_group(index, columns=there)

    def _file(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = pq.ParquetFile(self.filesystem.open_input_file(path), pre_buffer=True)
        return self._files[path]


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

    def keep_only(self, groups: Collection[int]) -> None:
        """Forget the row groups that are not among `groups`."""
        for part, rows in enumerate(self._parts):
            rows.keep_only([group - self._starts[part] for group in groups if self._part(group) == part])

    def _part(self, group: int) -> int:
        return bisect_right(self._starts, group) - 1
