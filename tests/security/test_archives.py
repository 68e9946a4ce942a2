"""Broken and hostile tars, zips and Parquet files: little memory, no hang, no crash; one line or a count for each."""

from __future__ import annotations

import gzip
import io
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.shard import ShardSettings
from components.shard.sources import SOURCES, parquet, tars
from components.shard.sources.base import RefusedSample
from llava.errors import RefusedInput
from tests.support.sources import coco, found, in_tar, in_zip, jpeg, told
from tests.support.time_limit import within

MEMORY = 300 * 2**20
"""Bytes that reading any of them may add to what the process takes."""
GOOD = {"00000.jpg": jpeg(), "00000.txt": b"a caption"}


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(60):
        yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def outcome(settings: ShardSettings) -> dict[str, str]:
    """Reason by name; or the one line, under ""."""
    try:
        return told(settings)
    except RefusedInput as error:
        assert "\n" not in str(error)
        return {"": str(error)}


# Tars of samples


def tar_of(files: dict[str, bytes], end: bool = True) -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        length = out.tell()
    return out.getvalue() if end else out.getvalue()[:length]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header."""
    body = b""
    for key, value in records:
        text = f" {key}={value}\n".encode()
        length = len(text) + len(str(len(text) + len(str(len(text)))))
        body += str(length).encode() + text
    return header("pax", len(body), kind) + block(body)


def bad_checksum() -> bytes:
    data = bytearray(gzip.compress(tar_of(GOOD)))
    data[-8] ^= 1
    return bytes(data)


def bomb(mebibytes: int = 1024, end: bool = False) -> bytes:
    """A good sample, then zeros: in a member, or behind the end of the archive."""
    packer = zlib.compressobj(9, wbits=31)
    start = tar_of(GOOD, end=False)
    start += bytes(10240) if end else header("00001.bin", mebibytes * 2**20)
    parts = [packer.compress(start), *(packer.compress(bytes(2**20)) for _ in range(mebibytes))]
    return b"".join([*parts, packer.flush()])


TARS: dict[str, Callable[[], bytes]] = {
    "cut": lambda: gzip.compress(tar_of(GOOD))[:-20],
    "checksum of gzip": bad_checksum,
    "bomb": bomb,
    "bomb behind the end": lambda: bomb(end=True),
    "PAX size beyond all": lambda: (
        tar_of(GOOD, end=False) + pax(("size", "9" * 40)) + header("1.jpg", 5) + bytes(1024)
    ),
    "PAX size below nothing": lambda: (
        tar_of(GOOD, end=False) + pax(("size", "-5000")) + header("1.jpg", 5) + bytes(1024)
    ),
    "PAX header of gigabytes": lambda: (
        tar_of(GOOD, end=False) + header("pax", 2**33 - 1, tarfile.XHDTYPE) + bytes(1024)
    ),
    "PAX headers without end": lambda: (
        tar_of(GOOD, end=False) + pax(("comment", "x" * 9)) * 3000 + header("1.jpg", 5) + bytes(1024)
    ),
    "PAX map of a sparse file": lambda: (
        tar_of(GOOD, end=False)
        + pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"))
        + header("1.jpg", 5)
        + block(b"no number\n")
        + bytes(1024)
    ),
    "PAX map without numbers": lambda: (
        tar_of(GOOD, end=False) + pax(("GNU.sparse.map", "a,b")) + header("1.jpg", 5) + bytes(1024)
    ),
    "header of noise": lambda: tar_of(GOOD, end=False) + b"\x07" * 1024,
    "not gzip after all": lambda: b"\x1f\x8b" + bytes(600),
}


@pytest.mark.parametrize("damage", TARS)
def test_a_broken_tar_gives_its_good_samples_and_a_count(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.tar").write_bytes(TARS[damage]())
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0)
    result = outcome(settings)
    if damage in ("cut", "checksum of gzip", "not gzip after all"):
        result.pop("00000", None)
    else:
        assert result.pop("00000") == ""
    sparse = {"1": "link"} if "map" in damage else {}
    assert result in ({"a.tar: the rest": "broken-tar"}, sparse, sparse | {"a.tar: the rest": "broken-tar"})
    assert result


def test_a_gzipped_tar_of_much_text_and_of_several_parts_is_read(tmp_path: Path) -> None:
    data = tar_of(GOOD | {"00001.jpg": jpeg(), "00001.json": b'{"caption": "b"}' + b" " * 900_000})
    parts = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    (tmp_path / "a.tar.gz").write_bytes(b"".join(map(gzip.compress, parts)) + bytes(100))
    assert told(ShardSettings(source="webdataset", path=str(tmp_path), heldout=0)) == {
        "00000": "",
        "00001": "",
    }


def test_six_pictures_of_one_sample_are_not_kept_in_memory(tmp_path: Path) -> None:
    in_tar(tmp_path, "a", {f"s.{suffix}": jpeg() for suffix in ("jpg", "png", "webp")} | {"s.txt": b"x"})
    (one,) = found(ShardSettings(source="webdataset", path=str(tmp_path), heldout=0))
    assert (one.name, one.reason) == ("s", "several-images")


# Archives of photos


def photos_in_tar(extra: bytes) -> bytes:
    return tar_of({"a.jpg": jpeg()}, end=False) + extra + bytes(1024)


def photos_in_zip(change: Callable[[bytearray], None] = lambda data: None) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", jpeg())
    data = bytearray(out.getvalue())
    change(data)
    return bytes(data)


def zip_bomb() -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(2**28))
    return out.getvalue()


def lying_zip() -> bytes:
    """The table says 100 bytes where 256 MiB come out."""
    data = bytearray(zip_bomb())
    table = data.index(b"PK\x01\x02")
    data[table + 24 : table + 28] = struct.pack("<I", 100)
    return bytes(data)


def long_table(data: bytearray) -> None:
    end = data.index(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", 2**31)


def wrong_checksum(data: bytearray) -> None:
    table = data.index(b"PK\x01\x02")
    data[table + 16] ^= 1


PHOTOS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "tar, PAX size beyond all": (
        "tar", lambda: photos_in_tar(pax(("size", "9" * 40)) + header("b.jpg", 5)), "no tar archive"
    ),
    "tar, PAX size below nothing": (
        "tar", lambda: photos_in_tar(pax(("size", "-9")) + header("b.jpg", 5)), "no tar archive"
    ),
    "tar, PAX headers without end": (
        "tar", lambda: photos_in_tar(pax(("comment", "x")) * 3000 + header("b.jpg", 5)), "no tar archive"
    ),
    "tar, a map without numbers": (
        "tar", lambda: photos_in_tar(pax(("GNU.sparse.map", "a,b")) + header("b.jpg", 5)), ""
    ),
    "tar, cut": ("tar", lambda: tar_of({"b.txt": b"", "a.jpg": jpeg()})[:1300], "no tar archive"),
    "tar, gzipped": ("tar", lambda: gzip.compress(tar_of({"a.jpg": jpeg()})), "no tar archive"),
    "zip, cut": ("zip", lambda: photos_in_zip()[:-30], "no zip archive"),
    "zip, checksum": ("zip", lambda: photos_in_zip(wrong_checksum), "broken"),
    "zip, bomb": ("zip", zip_bomb, "too-many-bytes"),
    "zip, a bomb that says it is none": ("zip", lying_zip, "broken"),
    "zip, a table of gigabytes": ("zip", lambda: photos_in_zip(long_table), "no zip archive"),
}  # fmt: skip


@pytest.mark.parametrize("damage", PHOTOS)
def test_a_broken_archive_of_photos_is_refused(tmp_path: Path, damage: str) -> None:
    suffix, make, wanted = PHOTOS[damage]
    settings = coco(tmp_path, ["a.jpg"])
    (tmp_path / f"images.{suffix}").write_bytes(make())
    result = outcome(settings)
    if wanted.startswith("no "):
        assert wanted in result[""]
    else:
        assert result == {"a": wanted}


def test_a_zip_with_a_long_table_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.shard.sources.archives._LONGEST_TABLE", 100)
    settings = coco(tmp_path, ["a.jpg"])
    in_zip(tmp_path, "images", {f"{number}.jpg": b"" for number in range(9)})
    assert "a table of 4" in outcome(settings)[""]


# Parquet


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def footer_of_depth(depth: int) -> bytes:
    """A file whose schema is a group in a group in a group."""

    def element(name: bytes, children: int = 0, leaf: bool = False) -> bytes:
        kind = b"\x15\x0c\x25\x02" if leaf else b"\x35\x02"  # BYTE_ARRAY; OPTIONAL
        held = b"\x15" + varint(2 * children) if children else b""
        return kind + b"\x18" + varint(len(name)) + name + held + b"\0"

    elements = [element(b"s", 1), *[element(b"a", 1)] * depth, element(b"x", leaf=True)]
    body = b"\x15\x02\x19\xfc" + varint(len(elements)) + b"".join(elements) + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + body + struct.pack("<I", len(body)) + b"PAR1"


def parquet_file(rows: int = 40, **options: Any) -> bytes:
    table = pa.table(
        {"image": [jpeg(colour=n % 250) for n in range(rows)], "caption": [f"c{n}" for n in range(rows)]}
    )
    pq.write_table(table, out := io.BytesIO(), **options)
    return out.getvalue()


def with_metadata(value: bytes) -> bytes:
    table = pa.table({"image": [jpeg()], "caption": ["c"]}).replace_schema_metadata({"huggingface": value})
    pq.write_table(table, out := io.BytesIO())
    return out.getvalue()


def damaged_page() -> bytes:
    """The second row group has a flipped bit, which its checksum tells."""
    data = bytearray(
        parquet_file(row_group_size=20, write_page_checksum=True, compression="none", use_dictionary=False)
    )
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    data[group.data_page_offset + group.total_compressed_size - 50] ^= 1
    return bytes(data)


def parquet_bomb() -> bytes:
    """One gigabyte of zeros."""
    table = pa.table({"image": pa.array([bytes(2**26)] * 4, pa.binary()), "caption": ["c"] * 4})
    pq.write_table(table, out := io.BytesIO(), compression="zstd", use_dictionary=False)
    return out.getvalue()


def repeated_photo(rows: int = 2_000_000) -> bytes:
    """A dictionary of one large photo, named by two million rows."""
    photo = jpeg(side=400)
    image = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([photo], pa.binary()))
    caption = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["c"])
    table = pa.table({"image": image, "caption": caption})
    pq.write_table(table, out := io.BytesIO(), store_schema=False, row_group_size=rows)
    return out.getvalue()


def flipped_footer() -> bytes:
    data = bytearray(parquet_file())
    size = struct.unpack("<I", data[-8:-4])[0]
    data[-8 - size : -8 - size + 40] = b"\xff" * 40
    return bytes(data)


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no Parquet file that can be read"),
    "cut": (lambda: parquet_file()[:-100], "no Parquet file that can be read"),
    "footer of noise": (flipped_footer, "no Parquet file that can be read"),
    "footer longer than the file": (
        lambda: parquet_file()[:-8] + b"\xff\xff\xff\x7fPAR1", "no Parquet file that can be read"
    ),
    "schema of 3,000 levels": (lambda: footer_of_depth(3_000), "nested too deeply"),
    "schema of 100,000 levels": (lambda: footer_of_depth(100_000), "no Parquet file that can be read"),
    "deep metadata": (lambda: with_metadata(b"[" * 100_000), ""),
    "metadata of noise": (lambda: with_metadata(b"\xff\xfe{"), ""),
}  # fmt: skip


def settings_of(folder: Path) -> ShardSettings:
    return ShardSettings(
        source="parquet", path=str(folder), texts=("caption",), image_columns=("image",), heldout=0
    )


@pytest.mark.parametrize("damage", FILES)
def test_a_parquet_file_with_a_broken_footer_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    make, wanted = FILES[damage]
    (tmp_path / "a.parquet").write_bytes(make())
    for named in (("image",), ()):
        settings = settings_of(tmp_path).model_copy(update={"image_columns": named})
        if not wanted:
            assert set(outcome(settings).values()) == ({""} if named else {"image-missing"})
            continue
        assert "a.parquet" in outcome(settings)[""]
        assert wanted in outcome(settings)[""]


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_a_deep_schema_among_good_files_is_named(tmp_path: Path, source: str) -> None:
    for name, data in (("a", parquet_file()), ("b", footer_of_depth(9_000)), ("c", parquet_file())):
        (tmp_path / f"{name}.parquet").write_bytes(data)
    settings = (
        settings_of(tmp_path) if source == "parquet" else ShardSettings(source=source, path=str(tmp_path))
    )
    with pytest.raises(RefusedInput, match=r"b\.parquet is no Parquet file .* nested too deeply"):
        SOURCES[source].check(settings)
        SOURCES[source].listing(settings)


def test_a_damaged_page_costs_the_rest_of_its_row_group(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(damaged_page())
    outcomes = found(settings_of(tmp_path))
    assert [one.reason for one in outcomes if isinstance(one, RefusedSample)] == ["broken-parquet"]
    assert 20 <= len(outcomes) <= 41


@pytest.mark.parametrize("bomb", ["parquet_bomb", pytest.param("repeated_photo", marks=pytest.mark.drill)])
def test_a_parquet_bomb_is_cut_off_and_counted(tmp_path: Path, bomb: str) -> None:
    folder = f"from tests.security import test_archives as t; folder = t.Path({str(tmp_path)!r})"
    write = f'{folder}; (folder / "a.parquet").write_bytes(t.{bomb}())'
    read = f"""{folder}
before = t.resource.getrusage(t.resource.RUSAGE_SELF).ru_maxrss
seen = [getattr(one, "reason", "") for one in t.found(t.settings_of(folder))]
after = t.resource.getrusage(t.resource.RUSAGE_SELF).ru_maxrss
print(seen[-1], len(seen), (after - before) * 1024 < t.MEMORY)
"""
    subprocess.run([sys.executable, "-c", write], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-c", read], capture_output=True, text=True, check=True, timeout=60
    )
    last, count, little = done.stdout.split()
    assert (last, little) == ("bomb", "True")
    assert int(count) < 60_000


def test_as_many_rows_as_a_file_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_file())
    monkeypatch.setattr(parquet, "most_unpacked", lambda packed: 10)
    with pytest.raises(RefusedInput, match="impossible numbers of rows"):
        parquet.listing(settings_of(tmp_path))


def test_a_bound_on_unpacking_leaves_room_for_small_files() -> None:
    assert tars.most_unpacked(10) == 1000 + 64 * 2**20
