"""Parquet files that may be damaged, or made to do damage."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava.errors import RefusedInput, from_a_store

_ENTRIES, _DEEPEST = 10_000, 64
"""Row groups or columns of a file; levels of a column."""
_STACK = 64 * 2**20
"""Bytes, eight times what the deepest column of `_ENTRIES` takes: pyarrow reads a schema by recursion, in C++."""
_turn = threading.Lock()


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


def open_parquet(source: Any, where: str, **how: Any) -> pq.ParquetFile:
    """A Parquet file, whoever made it. Raises `RefusedInput` for one that is damaged, or too deep to be handled."""

    def opened() -> tuple[pq.ParquetFile | None, int]:
        file = pq.ParquetFile(source, thrift_container_size_limit=_ENTRIES, **how)
        columns = file.metadata.schema
        depth = max((columns.column(number).path.count(".") for number in range(len(columns))), default=0)
        return (file if depth <= _DEEPEST else None), depth

    # In a common thread a schema of some thousand levels ends the process, when it is made and when it is freed.
    with damage_told(where), ThreadPoolExecutor(1, "footer") as deep:
        with _turn:
            before = threading.stack_size(_STACK)
            try:
                opening = deep.submit(opened)
            finally:
                threading.stack_size(before)
        file, depth = opening.result()
    if file is None:
        raise RefusedInput(
            f"{where} is no Parquet file that can be read: nested too deeply, {depth:,} levels"
        )
    return file


def read_parquet(data: bytes, where: str, columns: list[str] | None = None) -> pa.Table:
    """All rows of a Parquet file that is at hand. Raises `RefusedInput` for one that is damaged."""
    with open_parquet(io.BytesIO(data), where) as file, damage_told(where):
        return file.read(columns)
