"""Parquet files from anybody: damaged, cut off, or too deep; each is refused in one line that names the file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.contract import open_store
from components.shard.settings import ShardSettings
from components.shard.sources import parquet
from llava.errors import RefusedInput
from tests.support.command import llava

ROWS = {"image": [b"no picture"] * 40, "text": ["a cat"] * 40}


def written(
    path: Path, columns: dict[str, list[object]] | None = None, metadata: dict[str, str] | None = None
) -> None:
    table = pa.table(columns or ROWS)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=10)


def footer_bytes(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[-8:-4], "little")


def scrambled(path: Path) -> None:
    """Zeros in the middle of the footer."""
    written(path)
    data = bytearray(path.read_bytes())
    middle = len(data) - 8 - footer_bytes(path) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)


def cut(path: Path) -> None:
    written(path)
    path.write_bytes(path.read_bytes()[:-20])


def long_footer(path: Path) -> None:
    written(path)
    path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1")


def deep_schema(path: Path) -> None:
    kind = pa.string()
    for _ in range(4000):
        kind = pa.struct([("a", kind)])
    pq.ParquetWriter(path, pa.schema([("text", kind)]), store_schema=False).close()


def wide(path: Path) -> None:
    written(path, {f"c{number}": [1] for number in range(12_000)})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "damaged footer": scrambled,
    "cut off": cut,
    "footer longer than the file": long_footer,
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("PAR1 is how it begins"),
    "only marks": lambda path: path.write_bytes(b"PAR1\0\0\0\0PAR1"),
    "deep schema": deep_schema,
    "wide schema": wide,
}


def settings(folder: Path) -> ShardSettings:
    return ShardSettings(source="parquet", path=str(folder), texts=("text",), image_columns=("image",))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    DAMAGES[name](tmp_path / "part.parquet")
    with pytest.raises(RefusedInput) as refused:
        parquet.listing(settings(tmp_path))
    assert f"{tmp_path}/part.parquet" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    scrambled(tmp_path / "data" / "part.parquet")
    told = {"source": "parquet", "path": tmp_path / "data", "texts": "[text]", "image_columns": "[image]"}
    arguments = [part for key, value in told.items() for part in ("--set", f"shard.{key}={value}")]
    ended = llava("shard", "tiny", "--root", "root", *arguments, cwd=tmp_path)
    assert (ended.status, ended.out) == (2, ""), ended.err
    assert "part.parquet is no Parquet file that can be read" in ended.line and "Traceback" not in ended.err


def test_deep_metadata_of_the_features_says_nothing(tmp_path: Path) -> None:
    for deep in ("[" * 100_000, '{"info": {"features": {"image": ' + '{"feature": ' * 900 + "1" + "}" * 903):
        written(tmp_path / "part.parquet", metadata={"huggingface": deep})
        assert parquet.listing(settings(tmp_path)).items


@pytest.mark.drill
def test_no_byte_of_a_file_makes_another_error(tmp_path: Path) -> None:
    """300 files, each with a few other bytes: refused, or read."""
    chosen, path = random.Random(7), tmp_path / "part.parquet"
    written(path, metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})})
    sound = path.read_bytes()
    refused = 0
    for number in range(300):
        data = bytearray(sound)
        first = len(data) - 8 - footer_bytes(path) if number % 2 else 4
        for _ in range(chosen.choice((1, 2, 8))):
            data[chosen.randrange(first, len(data) - 8)] = chosen.randrange(256)
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "part.parquet").write_bytes(data)
        try:
            own = settings(tmp_path / "other")
            found = parquet.listing(own)
            list(parquet.rows(own, found.shared, list(found.items), open_store(tmp_path / "kept")))
        except RefusedInput:
            refused += 1
    assert refused > 50
