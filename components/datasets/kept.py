"""What was read out of a dataset's file, kept in the root as a table: found again, or made now."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.contract.digest import sha256_of
from components.contract.store import Folder
from llava.data.parquet_files import read_parquet


def kept_table(cache: Folder, made_of: Mapping[str, Any], make: Callable[[], pa.Table]) -> pa.Table:
    """The table that `cache` holds for `made_of` (JSON values: all that decides it), or what `make` gives."""
    key = f"{sha256_of(made_of)[:32]}.parquet"
    if found := cache.fetch(key):
        return read_parquet(found[0], f"{cache.uri}/{key}")
    made = make()
    pq.write_table(made, buffer := io.BytesIO(), compression="zstd")
    cache.write(key, buffer.getvalue())
    return made
