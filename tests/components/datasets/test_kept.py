"""A table that was read out of a file is read once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from components.contract.store import open_store
from components.datasets.kept import kept_table


def test_a_table_is_made_once_for_what_decides_it(tmp_path: Path) -> None:
    cache = open_store(str(tmp_path)).sub("kept")
    made = []

    def make() -> pa.Table:
        made.append(len(made))
        return pa.table({"number": [len(made)]})

    one, again = (kept_table(cache, {"file": "abc", "rules": "1"}, make) for _ in range(2))
    other = kept_table(cache, {"file": "abc", "rules": "2"}, make)
    assert one.equals(again)
    assert not one.equals(other)
    assert len(made) == 2
