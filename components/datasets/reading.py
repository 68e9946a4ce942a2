"""The Parquet files of a dataset, whoever made them: what is damaged or of other columns is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.contract import Artifact
from components.contract.store import Folder
from llava.data.parquet_files import damage_told, open_parquet
from llava.data.schema import DATASET_SCHEMA, WHEN_LEFT_OUT, Row, check_schema
from llava.errors import RefusedInput


def require_dataset(artifact: Artifact) -> None:
    """Raise RefusedInput for an artifact that holds no file of training rows."""
    if not artifact.parquet("train"):
        raise RefusedInput(f"{artifact.uri}: holds no train/*.parquet, so it is no dataset")


@dataclass(frozen=True)
class DatasetFile:
    """One file, open; memory holds one row group of it at a time."""

    where: str
    file: pq.ParquetFile

    @property
    def groups(self) -> list[int]:
        """How many rows each row group has."""
        about = self.file.metadata
        return [about.row_group(group).num_rows for group in range(about.num_row_groups)]

    def table(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group: of these columns, or parts of columns (`image.path`), those that the file has."""
        with damage_told(self.where):
            return self.file.read_row_group(group, columns=None if columns is None else list(columns))

    def rows_of(self, group: int, columns: Sequence[str] | None = None) -> list[Any]:
        """The rows of one row group as Python values; a column that the file leaves out is there too."""
        wanted = DATASET_SCHEMA.names if columns is None else [name.partition(".")[0] for name in columns]
        table = self.table(group, columns)
        left_out = {
            name: WHEN_LEFT_OUT.get(name)
            for name in wanted
            if name in DATASET_SCHEMA.names and name not in table.column_names
        }
        with damage_told(self.where):
            found: list[Any] = table.to_pylist()
        return [{**left_out, **row} for row in found] if left_out else found

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """All rows."""
        for group in range(self.file.num_row_groups):
            yield from self.rows_of(group, columns)


@contextmanager
def opened(folder: Folder, key: str) -> Iterator[DatasetFile]:
    """The file `key` of a dataset's folder. Raises `RefusedInput` where it is none, or has columns of other types."""
    where = f"{folder.uri}/{key}"
    with folder.open(key) as source, open_parquet(source, where) as file:
        with damage_told(where):
            schema = file.schema_arrow
        check_schema(schema, [name for name in schema.names if name in DATASET_SCHEMA.names], where)
        yield DatasetFile(where, file)


def rows_of(folder: Folder, key: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of the file `key`; `columns` limits what is read."""
    with opened(folder, key) as file:
        yield from file.rows(columns)


def count_of(folder: Folder, key: str) -> int:
    """How many rows the file `key` has; reads its footer only."""
    with opened(folder, key) as file:
        return sum(file.groups)
