"""Rows of Parquet files by (row group, row), read a row group at a time and kept for a while."""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import pyarrow as pa
from pyarrow import fs
from pyarrow import parquet as pq

from llava.errors import RefusedInput


class ParquetRows:
    """All row groups of `paths`, numbered through in the order of the paths."""

    def __init__(
        self, filesystem: fs.FileSystem, paths: Sequence[str], columns: Sequence[str], keep_groups: int = 16
    ):
        self.filesystem = filesystem
        self.columns = list(columns)
        self.groups: list[tuple[str, int, int]] = []
        """(path, row group within the file, rows)."""
        self._keep = keep_groups
        self._files: dict[str, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = Lock()
        for path in paths:
            metadata = self._file(path).metadata
            self.groups += [
                (path, index, metadata.row_group(index).num_rows) for index in range(metadata.num_row_groups)
            ]
        if not self.groups:
            raise RefusedInput("the dataset has no rows: no Parquet file with a row group among its files")

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group; `columns` other than the reader's own are read afresh."""
        path, index, _ = self.groups[group]
        if columns is not None:
            return self._file(path).read_row_group(index, columns=list(columns))
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            table = self._file(path).read_row_group(index, columns=self.columns)
            self._cache[group] = table
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
            return table

    def row(self, group: int, row: int) -> dict[str, Any]:
        """One row as Python values."""
        return self.table(group).slice(row, 1).to_pylist()[0]

    def _file(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = pq.ParquetFile(self.filesystem.open_input_file(path), pre_buffer=True)
        return self._files[path]
