"""Photos inside a zip or a tar: read in place, and what such a file may not hold."""

from __future__ import annotations

import io
import random
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from components.contract.store import open_store
from llava.errors import RefusedInput
from tests.support.sources import (
    bytes_of,
    coco,
    found,
    in_tar,
    in_zip,
    jpeg,
    llava,
    photos,
    told,
)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_a_zip_are_read_in_place(tmp_path: Path, method: int) -> None:
    files = photos(40)
    settings = coco(tmp_path / "data", files)
    in_zip(tmp_path / "data", "images", files, method)
    assert bytes_of(settings) == list(files.values())


def test_photos_and_annotations_are_read_from_s3_zips_and_tars_too(s3_root: str, tmp_path: Path) -> None:
    files = photos(6)
    settings = coco(tmp_path / "data", files)
    in_zip(tmp_path / "data", "images", dict(list(files.items())[:3]))
    in_tar(tmp_path / "data", "more", dict(list(files.items())[3:]))
    store = open_store(f"{s3_root}/data")
    for path in (tmp_path / "data").rglob("*.*"):
        store.upload(path, path.relative_to(tmp_path / "data").as_posix())
    settings = settings.model_copy(update={"path": store.uri, "roots": (f"{store.uri}/more.tar",)})
    assert bytes_of(settings) == list(files.values())
    records = llava(
        tmp_path / "mix", files, "mix.jsonl", roots=(f"{store.uri}/images.zip", f"{store.uri}/more.tar")
    )
    mix = open_store(f"{s3_root}/mix")
    mix.upload(tmp_path / "mix" / "mix.jsonl", "mix.jsonl")
    assert bytes_of(records.model_copy(update={"path": mix.uri})) == list(files.values())


def test_what_an_archive_may_not_hold_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "in.tar", "w") as archive:
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        large = tarfile.TarInfo("large.jpg")
        large.size = 300_000
        archive.addfile(large, io.BytesIO(bytes(300_000)))
    with zipfile.ZipFile(data / "images.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr("bomb.jpg", bytes(50_000_000))
        packed.writestr("lzma.jpg", jpeg(), zipfile.ZIP_LZMA)
        packed.writestr("liar.jpg", bytes(3000))
        packed.writestr("stored.jpg", jpeg(), zipfile.ZIP_STORED)
        for name in ("wide.jpg", "end.jpg", "after.jpg", "far.jpg"):
            packed.writestr(name, jpeg())
        huge = zipfile.ZipInfo("huge.jpg")
        huge.extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
        packed.writestr(huge, jpeg())
        packed.writestr("rest.bin", random.Random(0).randbytes(3_000_000))
        packed.writestr("good.jpg", jpeg())
    raw = bytearray((data / "images.zip").read_bytes())
    for name, field, value in (
        ("liar.jpg", 24, 2000),  # 20: bytes packed, 24: bytes unpacked, 42: where it lies
        ("stored.jpg", 20, 2_000_000_000),
        ("wide.jpg", 20, 2_000_000),
        ("end.jpg", 42, len(raw) - 10),
        ("after.jpg", 42, len(raw) + 1),
        ("far.jpg", 42, 2**32 - 2),
        ("huge.jpg", 24, 2**32 - 1),  # the extra field has it
    ):
        table = raw.rindex(name.encode()) - 46
        raw[table + field : table + field + 4] = value.to_bytes(4, "little")
    (data / "images.zip").write_bytes(raw)
    names = ["soft", "hard", "pipe", "large", "link", "bomb", "lzma", "liar"]
    names += ["stored", "wide", "end", "after", "far", "huge", "good"]
    settings = llava(
        data, [f"{name}.jpg" for name in names], max_image_bytes=200_000, roots=(f"{data}/in.tar",)
    )
    assert list(told(settings).values()) == [
        "link", "link", "link", "too-many-bytes", "link", "too-many-bytes", "archive-member",
        *["broken"] * 6, "too-many-bytes", "",
    ]  # fmt: skip


def test_a_zip_that_begins_later_than_it_says_has_members_before_its_beginning(tmp_path: Path) -> None:
    settings = llava(tmp_path, ["a.jpg", "b.jpg"])
    in_zip(tmp_path, "images", {"a.jpg": jpeg(), "b.jpg": jpeg(colour=1)})
    raw = bytearray((tmp_path / "images.zip").read_bytes())
    end = raw.rindex(b"PK\5\6")
    start = int.from_bytes(raw[end + 16 : end + 20], "little") + 10
    raw[end + 16 : end + 20] = start.to_bytes(4, "little")
    (tmp_path / "images.zip").write_bytes(raw)
    assert list(told(settings).values()) == ["broken", "broken"]


@pytest.mark.parametrize("size", [-2048, 2**70])
def test_a_tar_with_an_impossible_size_is_refused_before_work(tmp_path: Path, size: int) -> None:
    settings = llava(tmp_path, ["a.jpg"])
    in_tar(tmp_path, "images", {"a.jpg": jpeg(), "b.jpg": jpeg()})
    raw = bytearray((tmp_path / "images.tar").read_bytes())
    second = raw.rindex(b"b.jpg")
    raw[second + 124 : second + 136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    raw[second + 148 : second + 156] = b" " * 8
    raw[second + 148 : second + 156] = b"%06o\0 " % sum(raw[second : second + 512])
    (tmp_path / "images.tar").write_bytes(raw)
    with pytest.raises(RefusedInput, match=r"images\.tar: no tar archive that can be read in place"):
        found(settings)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("empty", "images.zip"),
        ("empty", "images.tar"),
        ("cut", "images.zip"),
        ("cut", "images.tar"),
        # A zip's table stands at its end.
        ("noise", "images.tar"),
    ],
)
def test_a_damaged_archive_of_photos_is_refused_before_work(tmp_path: Path, name: str, damage: str) -> None:
    files = photos(20)
    settings = coco(tmp_path / "data", files)
    (in_zip if name.endswith(".zip") else in_tar)(tmp_path / "data", "images", files)
    whole = (tmp_path / "data" / name).read_bytes()
    bad = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "noise": whole[:1024] + b"\x07" * 4096 + whole[5120:],
    }
    (tmp_path / "data" / name).write_bytes(bad[damage])
    with pytest.raises(RefusedInput, match=rf"{name}: no (zip|tar) archive that can be read in place"):
        found(settings)
