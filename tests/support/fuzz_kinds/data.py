"""Files of data: tables, archives and pictures."""

from __future__ import annotations

import functools
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.contract import open_store
from components.datasets.reading import rows_of
from components.instruct.llm.responses import SCHEMA, adopt, stored
from components.shard import ShardSettings
from components.training.data import extra_sources
from components.training.settings import Extra
from llava.data.images import BadImage, decode, prove, shrink, thumbnail
from llava.data.reader import ParquetRows
from llava.data.schema import write_rows
from tests.support.fuzz_kinds.kind import SAMPLE, Kind, Readers, allowing
from tests.support.fuzzing import like_bytes, like_json, like_lines
from tests.support.sources import coco, in_zip, jpeg, llava, told


def llava_json(place: Path) -> Kind:
    settings = llava(place / "data", ["a.jpg", None, ["a.jpg", "b.jpg"]])
    lines = llava(place / "lines", ["a.jpg", None, ["a.jpg", "b.jpg"]], "mix.jsonl")
    for folder in ("data", "lines"):
        for name in ("a.jpg", "b.jpg"):
            (place / folder / name).write_bytes(jpeg())
    values = json.loads((place / "data" / "mix.json").read_text())

    def inputs(chance: Random) -> tuple[str, ShardSettings, bytes]:
        if chance.random() < 0.5:
            return "data/mix.json", settings, like_json(chance, values)
        return "lines/mix.jsonl", lines, like_lines(chance, values)

    def readers(found: tuple[str, ShardSettings, bytes]) -> Readers:
        (place / found[0]).write_bytes(found[2])
        return [lambda: told(found[1])]

    return inputs, readers


def coco_json(place: Path) -> Kind:
    settings = coco(place / "data", ["a.jpg", "b.jpg"])
    (path,) = (place / "data").rglob("captions*.json")
    for name in ("a.jpg", "b.jpg"):
        (place / "data" / name).write_bytes(jpeg())

    def readers(data: bytes) -> Readers:
        path.write_bytes(data)
        return [lambda: told(settings)]

    value = json.loads(path.read_text())
    return lambda chance: like_json(chance, value), readers


def parquet_files(place: Path) -> Kind:
    for folder in ("data", "dataset", "responses"):
        (place / folder).mkdir()
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
    table = pa.table({"image": [{"bytes": jpeg(), "path": "a.jpg"}] * 6, "text": ["a cat"] * 6})
    pq.write_table(table.replace_schema_metadata({"huggingface": features}), place / "x", row_group_size=2)
    turns = SAMPLE["conversations"]
    rows: Any = [
        {"id": str(n), "image": {"bytes": jpeg(), "path": "a"}, "conversations": turns} for n in range(3)
    ]
    write_rows(place / "y", rows)
    answer: Any = ["ab" * 32, "p", "detail", 0, 200, "{}", 3, 4, 0.5]
    pq.write_table(
        pa.table({name: [one] for name, one in zip(SCHEMA.names, answer, strict=True)}, SCHEMA), place / "z"
    )
    goals = {"x": "data/a.parquet", "y": "dataset/a.parquet", "z": "responses/00000-00000-ab.parquet"}
    settings = ShardSettings(
        source="parquet", path=str(place / "data"), texts=("text",), image_columns=("image",)
    )
    extra = (Extra(uri=str(place / "dataset")),)
    whole = {name: (place / name).read_bytes() for name in goals}

    def inputs(chance: Random) -> tuple[str, bytes]:
        name = chance.choice(list(goals))
        return name, like_bytes(chance, whole[name])

    def trained_on() -> None:
        opened: ParquetRows = extra_sources("finetune", extra)[0].open("conversations")
        for group in range(len(opened.groups)):
            opened.table(group)

    def readers(found: tuple[str, bytes]) -> Readers:
        (place / goals[found[0]]).write_bytes(found[1])
        readers: dict[str, Readers] = {
            "x": [lambda: told(settings)],
            "y": [lambda: list(rows_of(open_store(place / "dataset"), "a.parquet")), trained_on],
            "z": [
                lambda: stored(open_store(place)),
                lambda: adopt(open_store(place), open_store(place / "n"), {}, int),
            ],
        }
        return readers[found[0]]

    return inputs, readers


def tars(place: Path) -> Kind:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
        for number in range(3):
            for suffix, data in {"jpg": jpeg(), "txt": b"a cat", "json": b'{"caption": "x"}'}.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    plain, packed = out.getvalue(), gzip.compress(out.getvalue(), mtime=0)
    settings = ShardSettings(source="webdataset", path=str(place / "data"))
    (place / "data").mkdir()

    def inputs(chance: Random) -> tuple[str, bytes]:
        match chance.randrange(3):
            case 0:
                return "a.tar", like_bytes(chance, plain)
            case 1:
                return "a.tar.gz", gzip.compress(like_bytes(chance, plain), 1, mtime=0)
        return "a.tar.gz", like_bytes(chance, packed)

    def readers(found: tuple[str, bytes]) -> Readers:
        for old in (place / "data").iterdir():
            old.unlink()
        (place / "data" / found[0]).write_bytes(found[1])
        return [lambda: told(settings)]

    return inputs, readers


def zips(place: Path) -> Kind:
    settings = coco(place / "data", ["a.jpg", "b.jpg"])
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        in_zip(place / "data", "images", {"a.jpg": jpeg(), "b.jpg": jpeg()}, method)
        seeds.append((place / "data" / "images.zip").read_bytes())

    def readers(data: bytes) -> Readers:
        (place / "data" / "images.zip").write_bytes(data)
        return [lambda: told(settings)]

    return lambda chance: like_bytes(chance, chance.choice(seeds)), readers


def pictures(place: Path) -> Kind:
    seeds = []
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        Image.new("RGB", (24, 16), (200, 30, 30)).save(out := io.BytesIO(), name)
        seeds.append(out.getvalue())

    def readers(data: bytes) -> Readers:
        works = [
            decode,
            prove,
            functools.partial(shrink, short_side=8),
            functools.partial(thumbnail, width=9, height=9),
        ]
        return [allowing(BadImage, functools.partial(work, data)) for work in works]

    return lambda chance: like_bytes(chance, chance.choice(seeds)), readers
