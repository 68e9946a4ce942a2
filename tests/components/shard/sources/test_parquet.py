"""Samples in Parquet files of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.shard import Shard, ShardSettings
from llava.errors import RefusedInput
from tests.support.sources import (
    found,
    jpeg,
    photos,
    told,
)


def test_img2datasets_parquet_is_read_where_no_tar_lies(tmp_path: Path) -> None:
    files = list(photos(4).values())
    table = pa.table(
        {
            "url": ["http://x"] * 5,
            "key": [f"{number:09d}" for number in range(5)],
            "status": ["success"] * 4 + ["failed_to_download"],
            "caption": [f"photo {number}" for number in range(5)],
            "jpg": pa.array([*files, None], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "00000.parquet", row_group_size=2)
    pq.write_table(table.drop_columns(["jpg"]), tmp_path / "00001.parquet")
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0)
    *rows, last = found(settings)
    assert [one.row["image"]["bytes"] for one in rows] == files
    assert rows[3].row["captions"] == ["photo 3"]
    assert (last.name, last.reason) == ("000000004", "image-missing")


# Hugging Face datasets


def test_what_datasets_writes_is_read_and_what_is_written_datasets_reads(run_in: Any, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    files = list(photos(6).values())
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "text": datasets.Value("string"),
            "more": datasets.List(datasets.Value("string")),
        }
    )
    given = datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(files)],
            "text": [f"photo {n}" for n in range(6)],
            "more": [[f"again {n}", "  "] for n in range(6)],
        },
        features=features,
    )
    (tmp_path / "hf").mkdir()
    given.to_parquet(tmp_path / "hf" / "train-00000-of-00001.parquet", batch_size=4)
    settings = ShardSettings(
        source="parquet", path=str(tmp_path / "hf"), texts=("text", "more"), heldout=0, rows_per_shard=4
    )
    artifact = run_in(Shard(), settings).artifact
    ours = sorted(str(file) for file in artifact.local().glob("train/*.parquet"))
    read = datasets.load_dataset("parquet", data_files=ours, split="train", cache_dir=str(tmp_path / "cache"))
    assert read["captions"][:] == [[f"photo {n}", f"again {n}"] for n in range(6)]
    assert [picture.size for picture in read["image"]] == [(40, 40)] * 6
    raw = read.cast_column("image", datasets.Image(decode=False))
    assert [one["bytes"] for one in raw["image"]] == files

    (tmp_path / "again").mkdir()
    read.to_parquet(tmp_path / "again" / "data.parquet")
    back = ShardSettings(source="parquet", path=str(tmp_path / "again"), texts=("captions",), heldout=0)
    rows = [one.row for one in found(back)]
    assert [row["image"]["bytes"] for row in rows] == files
    assert [row["id"] for row in rows] == read["id"][:]
    assert [row["captions"] for row in rows] == read["captions"][:]


def test_conversations_and_several_pictures_of_a_parquet_file_are_kept(tmp_path: Path) -> None:
    first, second = photos(2).values()
    turns = [{"from": "human", "value": "<image> <image>?"}, {"from": "gpt", "value": "Both."}]
    alone = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]
    images = [[{"bytes": first, "path": None}, {"bytes": second, "path": "b.jpg"}], [], None]
    table = pa.table({"images": images, "conversations": [turns, alone, turns]})
    pq.write_table(table, tmp_path / "a.parquet")
    settings = ShardSettings(
        source="parquet", path=str(tmp_path), image_columns=("images",), texts=("conversations",), heldout=0
    )
    pair, text, bad = found(settings)
    assert pair.row["image"]["bytes"] == first
    assert pair.row["more_images"] == [{"bytes": second, "path": "b.jpg"}]
    assert [pair.row["id"], text.row["id"]] == ["a-0", "a-1"]
    assert text.row["conversations"] == alone
    assert bad.reason == "slot-without-image"


def test_a_picture_that_is_only_a_path_is_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    cells = [{"bytes": None, "path": str(tmp_path / "secret.jpg")}, {"bytes": jpeg(), "path": "/etc/passwd"}]
    (tmp_path / "data").mkdir()
    table = pa.table(
        {
            "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": pa.StringArray.from_buffers(
                2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\5\0\0\0"), pa.py_buffer(b"acaf\xe9")
            ),
        }
    )
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    settings = ShardSettings(source="parquet", path=str(tmp_path / "data"), texts=("text",), heldout=0)
    assert told(settings) == {"a-0": "path-without-bytes", "a-1": "text-not-unicode"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ("nothing",)}, r"shard\.texts: .* has no column 'nothing'; there are a, b, text, number"),
        ({"texts": ("number",)}, r"shard\.texts: column 'number' .* is int64"),
        ({"texts": ("text",)}, r"pictures in a, b; choose in shard\.image_columns"),
        ({"texts": ("text",), "image_columns": ("text",)}, r"shard\.image_columns: column 'text'"),
        ({"texts": ("text",), "image_columns": ("a",), "id_column": "no"}, r"shard\.id_column"),
        ({"texts": ("text",), "files": "x*"}, "no file is named like x"),
    ],
)
def test_columns_that_cannot_be_right_are_refused_with_the_key(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    picture = pa.array([{"bytes": jpeg(), "path": "x"}])
    pq.write_table(
        pa.table({"a": picture, "b": picture, "text": ["t"], "number": [1]}), tmp_path / "a.parquet"
    )
    with pytest.raises(RefusedInput, match=message):
        found(ShardSettings(source="parquet", path=str(tmp_path), **options))


def test_a_damaged_parquet_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RefusedInput, match=r"a\.parquet is no Parquet file that can be read"):
        found(ShardSettings(source="parquet", path=str(tmp_path), texts=("text",)))
