"""The reader: row groups ahead of time, one ranged read each, the same rows whatever was asked for before."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs

from components.contract.store import open_store
from llava.data.reader import Mixture, ParquetRows
from llava.data.schema import GroupSize, write_rows

COLUMNS = ("id", "image", "captions")


def rows(count: int, size: int = 3000) -> list[Any]:
    return [
        {
            "id": str(number),
            "image": {"bytes": random.Random(number).randbytes(size), "path": f"{number}.jpg"},
            "captions": [f"photo {number}"],
        }
        for number in range(count)
    ]


class Counting(fs.FileSystemHandler):
    """The local file system, which counts the reads of files and the bytes that they gave."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def open_input_file(self, path: str) -> Any:
        import pyarrow as pa

        counter = self

        class File(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                counter.reads.append(found := super().readinto(buffer) or 0)
                return found

            def read(self, size: int | None = -1) -> bytes:
                counter.reads.append(len(found := super().read(-1 if size is None else size) or b""))
                return found

        return pa.PythonFile(File(path), mode="r")

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)

    def _none(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = _none
    get_file_info = get_file_info_selector = move = normalize_path = open_append_stream = _none
    open_input_stream = open_output_stream = get_type_name = _none


@pytest.mark.parametrize("columns", [COLUMNS, ("id", "image", "captions", "conversations")])
def test_a_row_group_is_read_in_one_piece_and_read_once(tmp_path: Path, columns: tuple[str, ...]) -> None:
    write_rows(tmp_path / "part.parquet", rows(60), GroupSize(rows=20))
    counting = Counting()
    reader = ParquetRows(fs.PyFileSystem(counting), [str(tmp_path / "part.parquet")], columns)
    counting.reads.clear()
    assert reader.row(1, 7)["id"] == "27"
    assert reader.row(1, 3)["id"] == "23"
    # What lies between the columns that are wanted is less than what asking again would cost: one read.
    assert len(counting.reads) == 1
    assert 20 * 3000 < counting.reads[0] < 20 * 3000 * 1.1


def test_rows_are_the_same_from_a_folder_and_from_s3_in_any_order_with_and_without_prefetch(
    root: str, tmp_path: Path
) -> None:
    store = open_store(root)
    for part in range(3):
        write_rows(tmp_path / f"{part}.parquet", rows(50)[part * 10 : part * 10 + 25], GroupSize(rows=6))
        store.upload(tmp_path / f"{part}.parquet", f"{part}.parquet")
    filesystem, base = store.arrow()
    paths = [f"{base}/{part}.parquet" for part in range(3)]
    plain, ahead = (ParquetRows(filesystem, paths, COLUMNS, keep_groups=4) for _ in range(2))
    places = [(group, row) for group, (_, _, size) in enumerate(plain.groups) for row in range(size)]
    assert len(places) == 75
    for number in np.random.default_rng(0).permutation(len(places)).tolist():
        group, row = places[number]
        ahead.prefetch([group, (group + 1) % len(plain.groups)])
        found = ahead.row(group, row)
        assert found == plain.row(group, row)
        assert found == {**found, **rows(50)[int(found["id"])]}


def test_what_is_let_go_is_read_again_and_a_mixture_passes_it_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.parquet", [{"id": f"{name}{n}"} for n in range(10)], GroupSize(rows=2))
    parts = [
        ParquetRows(fs.LocalFileSystem(), [str(tmp_path / f"{name}.parquet")], ["id"]) for name in ("a", "b")
    ]
    mixture = Mixture([(part, 1.0) for part in parts])
    mixture.prefetch(range(10))
    assert [len(part._cache) for part in parts] == [5, 5]
    mixture.keep_only([1, 5])
    assert [list(part._cache) for part in parts] == [[1], [0]]
    assert [mixture.row(group, 1)["id"] for group in (0, 1, 4, 5, 9)] == ["a1", "a3", "a9", "b1", "b9"]


def test_a_read_that_failed_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    write_rows(path, rows(10))
    reader = ParquetRows(fs.LocalFileSystem(), [str(path)], COLUMNS)
    path.rename(tmp_path / "away.parquet")
    reader.prefetch([0])
    with pytest.raises(FileNotFoundError):
        reader.row(0, 0)
    (tmp_path / "away.parquet").rename(path)
    assert reader.row(0, 0)["id"] == "0"


def test_hundreds_of_files_do_not_stay_open(tmp_path: Path) -> None:
    for part in range(200):
        write_rows(tmp_path / f"{part:03d}.parquet", [{"id": str(part)}])
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ParquetRows(fs.LocalFileSystem(), paths, ["id"])
    assert [reader.row(group, 0)["id"] for group in range(200)] == [str(part) for part in range(200)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 100
