"""Parquet files that may be damaged, or made to do damage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava.errors import RefusedInput, from_a_store

_ENTRIES, _DEEPEST = 10_000, 64
"""Row groups or columns of a file from outside; levels of a column. pyarrow reads a schema by recursion, in C++."""


@contextlib.contextmanager
def damage_told(where: str) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into a `RefusedInput` that begins with `where`.

    Its errors for damage are of many classes. One of a disk or a network goes through.
    """
    try:
        yield
    except MemoryError:
        raise
    except (pa.ArrowException, RecursionError, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (error.errno or from_a_store(error)):
            raise
        reason = " ".join(str(error).split())[:300]
        raise RefusedInput(f"{where} is no Parquet file that can be read: {reason}") from error


def open_foreign(source: Any, where: str, **how: Any) -> pq.ParquetFile:
    """A Parquet file that anybody may have made. Raises `RefusedInput` for columns too deep to be handled."""
    file = pq.ParquetFile(source, thrift_container_size_limit=_ENTRIES, **how)
    columns = file.metadata.schema
    for number in range(len(columns)):
        if (depth := columns.column(number).path.count(".")) > _DEEPEST:
            raise RefusedInput(f"{where}: a column is {depth:,} levels deep, more than {_DEEPEST}")
    return file
