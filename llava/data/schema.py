"""The one row of every dataset, and how rows become Parquet.

One row is one sample; the split is the folder that the file lies in (`train/`, `heldout/`). The schema
carries the features metadata of Hugging Face `datasets`, so `load_dataset("parquet", data_files=...)` shows
the image as a picture.

| column | what it holds |
|---|---|
| id | name of the sample |
| image | the file's own bytes and its name; null for a text-only sample |
| more_images | the second and further pictures of a sample with several; null otherwise |
| width, height | pixels of the upright picture (after EXIF orientation); 0 for a text-only sample |
| captions | what people wrote about the picture |
| objects | category and bbox (COCO terms: x, y, w, h in pixels); null = unknown, [] = none |
| conversations | turns from "human" and "gpt"; the first n `<image>` of the human turns are the n pictures |
| kinds | the kind of question of each human turn |
| type | "conversation", "detail" or "reasoning" |

`image` stays a column of its own, since nearly all samples have one picture or none. A file may leave out
columns that it has no use for; what reads it finds null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava.errors import RefusedInput

SPLITS = ("train", "heldout")


class ImageCell(TypedDict):
    bytes: bytes
    path: str


class ObjectCell(TypedDict):
    category: str
    bbox: Sequence[float]


TurnCell = TypedDict("TurnCell", {"from": str, "value": str})


class Row(TypedDict, total=False):
    """A sample as Python values; a column that is left out is null (captions: empty; width, height: 0)."""

    id: str
    image: ImageCell | None
    more_images: list[ImageCell] | None
    width: int
    height: int
    captions: list[str]
    objects: list[ObjectCell] | None
    conversations: list[TurnCell] | None
    kinds: list[str] | None
    type: str | None


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _list(feature: Mapping[str, Any]) -> dict[str, Any]:
    return {"feature": feature, "_type": "List"}


_FEATURES = {
    "id": _value("string"),
    "image": {"_type": "Image"},
    "more_images": _list({"_type": "Image"}),
    "width": _value("int32"),
    "height": _value("int32"),
    "captions": _list(_value("string")),
    "objects": _list({"category": _value("string"), "bbox": _list(_value("float32"))}),
    "conversations": _list({"from": _value("string"), "value": _value("string")}),
    "kinds": _list(_value("string")),
    "type": _value("string"),
}

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_OBJECT = pa.struct([("category", pa.string()), ("bbox", pa.list_(pa.float32()))])
_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])

DATASET_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("image", _IMAGE),
        pa.field("more_images", pa.list_(_IMAGE)),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("objects", pa.list_(_OBJECT)),
        pa.field("conversations", pa.list_(_TURN)),
        pa.field("kinds", pa.list_(pa.string())),
        pa.field("type", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)

WHEN_LEFT_OUT: dict[str, Any] = {"width": 0, "height": 0, "captions": ()}

IMAGE_COLUMNS = ("image", "more_images")
TEXT_COLUMNS = tuple(name for name in DATASET_SCHEMA.names if name not in IMAGE_COLUMNS)
"""Every column but the pictures: cheap to read for a plan or a report."""


class GroupSize(NamedTuple):
    """Where a row group ends: after `rows` rows, or before the images in it pass `image_bytes` bytes."""

    rows: int = 256
    image_bytes: int = 128 * 2**20


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Build a table of `DATASET_SCHEMA` from rows. A key that the schema does not know is a `KeyError`."""
    rows, known = list(rows), frozenset(DATASET_SCHEMA.names)
    for row in rows:
        if unknown := row.keys() - known:
            raise KeyError(f"row {row.get('id')!r} has columns that no dataset has: {sorted(unknown)}")
    columns = [
        _column(field, [row.get(field.name, WHEN_LEFT_OUT.get(field.name)) for row in rows])
        for field in DATASET_SCHEMA
    ]
    return pa.table(columns, schema=DATASET_SCHEMA)


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if all(value is None for value in values):
        return pa.nulls(len(values), field.type)
    if not pa.types.is_struct(field.type):
        return pa.array(values, field.type)
    # Child by child: pyarrow takes three times as long over a list of dicts.
    missing = pa.array([value is None for value in values])
    children = []
    for child in field.type:
        parts = [None if value is None else value[child.name] for value in values]
        whole = pa.types.is_binary(child.type) and parts.count(None) == missing.true_count
        children.append(_joined(parts) if whole else pa.array(parts, child.type))
    return pa.StructArray.from_arrays(children, fields=list(field.type), mask=missing)


def _joined(parts: Sequence[bytes | None]) -> pa.Array:
    """Bytes copied once: pyarrow's own way grows a buffer and copies what is in it again. None becomes nothing."""
    filled = [part or b"" for part in parts]
    ends = np.cumsum([0, *map(len, filled)])
    if ends[-1] > np.iinfo(np.int32).max:
        return pa.array(filled, pa.binary())
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(filled))]
    return pa.Array.from_buffers(pa.binary(), len(filled), buffers)


def images_of(row: Mapping[str, Any]) -> list[ImageCell]:
    """All pictures of a row, in the order of their slots."""
    first, more = row.get("image"), row.get("more_images")
    return [*([first] if first else []), *(more or [])]


def check_schema(found: pa.Schema, columns: Iterable[str], where: str) -> None:
    """Refuse a file in which one of `columns` is missing or has another type; pictures may be missing."""
    for name in columns:
        expected = DATASET_SCHEMA.field(name).type
        if name in found.names and not found.field(name).type.equals(expected):
            raise RefusedInput(
                f"{where}: column {name!r} is {found.field(name).type}, expected {expected}; "
                "`llava shard` makes such files, llava/data/schema.py describes them"
            )
        if name not in found.names and name not in IMAGE_COLUMNS:
            raise RefusedInput(
                f"{where}: column {name!r} is missing, there are {', '.join(found.names)}; "
                "`llava shard` makes such files, llava/data/schema.py describes them"
            )


class DatasetWriter:
    """Writes rows to one Parquet file, a row group at a time, so that memory holds one group only.

    Text is compressed, image files are not (they already are). Rows of one row group that share an image
    store it once. The same rows and the same `GroupSize` give the same bytes.
    """

    def __init__(self, path: Path, group: GroupSize | None = None) -> None:
        self._group = group or GroupSize()
        self._pending: list[Row] = []
        self._pending_bytes = 0
        self.rows = 0
        self._writer = pq.ParquetWriter(
            path,
            DATASET_SCHEMA,
            compression={
                leaf: "none" if leaf.endswith(".bytes") else "zstd" for leaf in _leaves(DATASET_SCHEMA)
            },
            # The dictionary is what stores a shared image once. Past its limit the rest of a row group would
            # be stored image by image, so the limit is the format's own, far above any group's bytes.
            dictionary_pagesize_limit=2**31 - 1,
            write_page_index=True,
            write_statistics=["id", "width", "height", "type"],
        )

    def write(self, row: Row) -> None:
        """Add a row; a full row group goes to the file."""
        size = sum(len(image["bytes"]) for image in images_of(row))
        if self._pending and self._pending_bytes + size > self._group.image_bytes:
            self._flush()
        self._pending.append(row)
        self._pending_bytes += size
        self.rows += 1
        if len(self._pending) >= self._group.rows:
            self._flush()

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            table = to_table(self._pending)
            self._writer.write_table(table, row_group_size=table.num_rows)
            self._pending, self._pending_bytes = [], 0

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._writer.close()


def write_rows(path: Path, rows: Iterable[Row], group: GroupSize | None = None) -> int:
    """Write `rows` to a Parquet file at `path`; returns how many there were."""
    with DatasetWriter(path, group) as writer:
        for row in rows:
            writer.write(row)
    return writer.rows


def read_rows(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a Parquet file as Python values, a row group at a time; `columns` limits what is read."""
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=list(columns) if columns else None).to_pylist()


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of the Parquet columns that a schema's fields come down to, `image.bytes` and such."""

    def below(field: pa.Field, prefix: str) -> Iterator[str]:
        name = f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            for child in field.type:
                yield from below(child, f"{name}.")
        elif pa.types.is_list(field.type):
            yield from below(pa.field("element", field.type.value_type), f"{name}.list.")
        else:
            yield name

    return [leaf for field in schema for leaf in below(field, "")]
