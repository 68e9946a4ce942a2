"""The one dataset schema: what other tools see in it, and what a file of it costs."""

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS
from llava.data.schema import DATASET_SCHEMA, GroupSize, images_of, read_rows, to_table, write_rows
from llava.errors import RefusedInput


def photo(colour: tuple[int, int, int], side: int = 40) -> bytes:
    Image.new("RGB", (side, side), colour).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def noise(side: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 80).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def sample(name: str, image: bytes) -> dict:
    return {
        "id": name,
        "image": {"bytes": image, "path": f"{name}.png"},
        "more_images": None,
        "width": 40,
        "height": 40,
        "captions": ["a red square", "nothing but red"],
        "objects": [{"category": "square", "bbox": [0.0, 1.5, 40.0, 38.5]}],
        "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red."}],
        "kinds": ["colour"],
        "type": "conversation",
    }


def test_metadata_is_what_hugging_face_datasets_writes_itself() -> None:
    features = datasets.Features.from_arrow_schema(DATASET_SCHEMA)
    assert isinstance(features["image"], datasets.Image)
    assert features.arrow_schema.equals(DATASET_SCHEMA)
    assert datasets.Features.from_dict(features.to_dict()) == features


def test_load_dataset_decodes_the_image_and_keeps_every_column(tmp_path: Path) -> None:
    rows = [sample("a", photo((200, 10, 20))), {"id": "text only", "captions": []}]
    write_rows(tmp_path / "part.parquet", rows)
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "part.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded[0]["image"].getpixel((3, 3)) == (200, 10, 20)
    assert loaded[0]["conversations"] == rows[0]["conversations"]
    assert loaded[0]["objects"] == rows[0]["objects"]
    assert loaded[1]["image"] is None
    assert loaded[1]["objects"] is None


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    rows = [sample("a", photo((1, 2, 3))), sample("b", photo((4, 5, 6))) | {"objects": None, "kinds": None}]
    write_rows(tmp_path / "part.parquet", rows)
    assert list(read_rows(pq.ParquetFile(tmp_path / "part.parquet"))) == rows


def test_several_pictures_come_back_in_their_order_for_us_and_for_hugging_face(tmp_path: Path) -> None:
    colours = [(200, 10, 20), (10, 200, 20), (10, 20, 200)]
    first, *more = ({"bytes": photo(colour), "path": f"{colour[0]}.png"} for colour in colours)
    row = sample("several", photo(colours[0])) | {"image": first, "more_images": more}
    write_rows(tmp_path / "part.parquet", [row, sample("one", photo((1, 2, 3)))])
    several, one = read_rows(pq.ParquetFile(tmp_path / "part.parquet"))
    assert images_of(several) == [first, *more]
    assert len(images_of(one)) == 1
    assert images_of({"id": "text only"}) == []
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "part.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert [picture.getpixel((3, 3)) for picture in loaded[0]["more_images"]] == colours[1:]
    assert loaded[1]["more_images"] is None


def test_a_file_without_the_column_of_further_pictures_is_still_read(tmp_path: Path) -> None:
    table = to_table([sample("a", photo((1, 2, 3))), {"id": "text only"}]).drop_columns("more_images")
    pq.write_table(table, tmp_path / "part.parquet")
    rows = ParquetRows(fs.LocalFileSystem(), [str(tmp_path / "part.parquet")], VIEWS["conversations"][1])
    assert [len(images_of(rows.row(0, number))) for number in range(2)] == [1, 0]


def test_a_file_of_another_schema_is_refused_by_the_column(tmp_path: Path) -> None:
    where = tmp_path / "part.parquet"
    for table, message in (
        (
            pa.table({"id": ["a"], "text": ["b"]}),
            r"part\.parquet: column 'conversations' is missing.*id, text",
        ),
        (pa.table({"id": [1], "conversations": ["b"]}), r"column 'id' is int64, expected string"),
    ):
        pq.write_table(table, where)
        with pytest.raises(RefusedInput, match=message):
            ParquetRows(fs.LocalFileSystem(), [str(where)], VIEWS["conversations"][1])


def test_unknown_objects_and_no_objects_stay_two_things() -> None:
    table = to_table([{"id": "unknown", "objects": None}, {"id": "none", "objects": []}])
    assert table["objects"].to_pylist() == [None, []]


def test_a_column_outside_the_schema_is_refused() -> None:
    with pytest.raises(KeyError, match=r"row 'a'.*caption"):
        to_table([{"id": "a", "caption": "one"}])


def test_row_groups_end_at_the_row_bound_and_at_the_byte_bound(tmp_path: Path) -> None:
    image = noise()
    rows = [sample(str(index), image) for index in range(10)]
    by_rows = pq.ParquetFile(_written(tmp_path, rows, GroupSize(rows=4)))
    by_bytes = pq.ParquetFile(_written(tmp_path, rows, GroupSize(rows=100, image_bytes=3 * len(image))))
    assert _group_rows(by_rows) == [4, 4, 2]
    assert _group_rows(by_bytes) == [3, 3, 3, 1]


def test_an_image_over_the_byte_bound_has_a_row_group_of_its_own(tmp_path: Path) -> None:
    rows = [sample(str(index), noise()) for index in range(3)]
    assert _group_rows(pq.ParquetFile(_written(tmp_path, rows, GroupSize(image_bytes=10)))) == [1, 1, 1]


def test_an_image_shared_by_the_rows_of_a_group_is_stored_once(tmp_path: Path) -> None:
    image = noise(256)
    assert len(image) * 40 > 2**20  # past the writer's own limit for a dictionary
    path = _written(tmp_path, [sample(str(index), image) for index in range(40)], GroupSize())
    assert path.stat().st_size < 1.5 * len(image)


def test_many_images_that_repeat_stay_stored_once_past_the_default_dictionary_limit(tmp_path: Path) -> None:
    images = [noise(256) for _ in range(60)]
    rows = [sample(f"{number}-{turn}", image) for number, image in enumerate(images) for turn in range(3)]
    path = _written(tmp_path, rows, GroupSize(rows=1000))
    assert path.stat().st_size < 1.1 * sum(map(len, images))


def test_pictures_are_stored_as_they_are_and_text_is_compressed(tmp_path: Path) -> None:
    file = pq.ParquetFile(_written(tmp_path, [sample("a", noise())], GroupSize()))
    columns = [file.metadata.row_group(0).column(index) for index in range(file.metadata.num_columns)]
    codec = {column.path_in_schema: column.compression for column in columns}
    assert codec.pop("image.bytes") == "UNCOMPRESSED"
    assert codec.pop("more_images.list.element.bytes") == "UNCOMPRESSED"
    assert set(codec.values()) == {"ZSTD"}
    assert all(column.has_offset_index for column in columns)


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [sample(str(index), photo((index, 0, 0))) for index in range(5)]
    assert (
        _written(tmp_path, rows, GroupSize(2)).read_bytes()
        == _written(tmp_path, rows, GroupSize(2)).read_bytes()
    )


def _written(folder: Path, rows: list[dict], group: GroupSize) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.parquet"
    assert write_rows(path, rows, group) == len(rows)
    return path


def _group_rows(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
