"""The Parquet files of datasets that somebody else made: read, or refused in one line that names the file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.contract import open_store
from components.datasets.reading import count_of, rows_of
from components.scoring.questions import heldout_rows, read_questions
from llava.data.parquet_files import open_parquet
from llava.data.reader import ParquetRows
from llava.data.schema import write_rows
from llava.errors import RefusedInput
from tests.security.test_parquet import DAMAGES

KEY = "heldout/00000.parquet"


def deepest(path: Path) -> None:
    """As deep as a footer may announce: made in a thread with room for it."""

    def write() -> None:
        kind = pa.string()
        for level in range(4_900):
            kind = pa.list_(kind) if level % 2 else pa.struct([("a", kind)])
        pq.ParquetWriter(path, pa.schema([("text", kind)]), store_schema=False).close()
        del kind

    before = threading.stack_size(256 * 2**20)
    try:
        writer = threading.Thread(target=write)
        writer.start()
    finally:
        threading.stack_size(before)
    writer.join()


BAD: dict[str, Callable[[Path], object]] = {
    **DAMAGES,
    "deepest schema": deepest,
    "captions are numbers": lambda path: pq.write_table(pa.table({"captions": [[1]], "id": ["a"]}), path),
    "no text": lambda path: pq.write_table(
        pa.table({"id": pa.array([b"\xff"]).cast(pa.string(), False)}), path
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "heldout").mkdir()
    BAD[name](tmp_path / KEY)
    with pytest.raises(RefusedInput) as refused:
        list(rows_of(open_store(tmp_path), KEY))
    assert f"{tmp_path}/{KEY}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["deep schema", "damaged footer", "cut off"])
def test_whoever_reads_datasets_refuses_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "heldout").mkdir()
    BAD[name](tmp_path / KEY)
    folder = open_store(tmp_path)
    readers: list[Callable[[], object]] = [
        lambda: heldout_rows(folder),
        lambda: read_questions(folder, None, 0),
        lambda: count_of(folder, KEY),
        lambda: ParquetRows(folder.arrow()[0], [f"{tmp_path}/{KEY}"], ["id"]),
    ]
    for reader in readers:
        with pytest.raises(RefusedInput, match=KEY):
            reader()


def test_columns_that_a_file_leaves_out_are_null(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "other": [1]}), tmp_path / "a.parquet")
    (row,) = rows_of(open_store(tmp_path), "a.parquet")
    assert (row["id"], row["captions"], row["width"], row["conversations"]) == ("a", (), 0, None)
    (row,) = rows_of(open_store(tmp_path), "a.parquet", ["id", "image.path"])
    assert row == {"id": "a", "image": None}


def test_parts_of_columns_are_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [{"id": "a", "image": {"bytes": b"x", "path": "a.jpg"}}, {"id": "b"}])
    first, second = rows_of(open_store(tmp_path), "a.parquet", ["id", "image.path"])
    assert (first["image"], second["image"]) == ({"path": "a.jpg"}, None)


def test_the_stack_of_other_threads_stays_as_it_is(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [{"id": "a"}])
    before = threading.stack_size()
    open_parquet(tmp_path / "a.parquet", "a").close()
    assert threading.stack_size() == before
