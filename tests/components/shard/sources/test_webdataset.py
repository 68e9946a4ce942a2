"""Tars of samples, read from front to back."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.contract.store import open_store
from components.shard import Shard, ShardSettings
from components.shard.sources import SOURCES
from llava.errors import LlavaError
from tests.support.sources import (
    Files,
    found,
    in_folder,
    in_tar,
    jpeg,
    told,
    wds,
)


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_tars_of_samples_are_read_from_front_to_back(tmp_path: Path, mode: str) -> None:
    in_tar(tmp_path, "00000", wds(5), mode)
    in_tar(tmp_path, "00001", wds(4, start=5), mode)
    in_folder(tmp_path, ".", {"00000_stats.json": b"{}"})
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0)
    rows = [one.row for one in found(settings)]
    assert [row["id"] for row in rows] == [f"{number:05d}" for number in range(9)]
    assert [row["captions"] for row in rows] == [[f"photo {number:05d}"] for number in range(9)]
    assert [row["image"]["bytes"] for row in rows] == [jpeg(colour=number) for number in range(9)]
    chosen = settings.model_copy(update={"files": "*1.tar*"})
    assert [one.row["id"] for one in found(chosen)] == [f"{number:05d}" for number in range(5, 9)]


def test_each_sample_of_a_tar_that_is_no_pair_has_its_reason(tmp_path: Path) -> None:
    good = wds(1)
    files: Files = {
        "no-text.jpg": jpeg(),
        "by-json.png": jpeg(),
        "by-json.json": b'{"caption": "told"}',
        "bad-json.jpg": jpeg(),
        "bad-json.json": b"{oops",
        "no-image.txt": b"text alone",
        "other.cls": b"7",
        "two.jpg": jpeg(),
        "two.png": jpeg(),
        "two.txt": b"two",
        "again.txt": b"one",
        "dir/again.txt": b"another",
        "page.jpg": b"<html>",
        "page.txt": b"page",
        "latin.jpg": jpeg(),
        "latin.txt": b"caf\xe9",
        "long.jpg": jpeg(),
        "long.txt": b"x" * 2_000_000,
        "huge.jpg": bytes(500_000),
        "huge.txt": b"huge",
        "UPPER.JPG": jpeg(),
        "UPPER.TXT": b"large letters",
    }
    in_tar(tmp_path, "00000", files | good)
    settings = ShardSettings(source="webdataset", path=str(tmp_path), heldout=0, max_image_bytes=400_000)
    assert told(settings) == {
        "no-text": "no-caption", "by-json": "", "bad-json": "no-json", "no-image": "image-missing",
        "other": "image-missing", "two": "several-images", "again": "image-missing", "dir/again": "image-missing",
        "page": "unknown-format", "latin": "text-not-unicode", "long": "text-too-long", "huge": "too-many-bytes",
        "UPPER": "", "00000": "",
    }  # fmt: skip


def test_links_in_a_tar_of_samples_are_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    assert told(ShardSettings(source="webdataset", path=str(tmp_path))) == {"s": "link", "h": "link"}


def hostile_name() -> bytes:
    """A tar header that announces a name of 8 GB."""
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**33 - 1
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("damage", ["cut", "noise", "name", "empty", "half-gzip"])
def test_a_damaged_tar_gives_what_stands_before_the_damage_and_says_so(tmp_path: Path, damage: str) -> None:
    in_tar(tmp_path, "whole", wds(20))
    whole = (tmp_path / "whole.tar").read_bytes()
    in_tar(tmp_path, "packed", wds(20), "w:gz")
    packed = (tmp_path / "packed.tar.gz").read_bytes()
    (tmp_path / "whole.tar").unlink()
    (tmp_path / "packed.tar.gz").unlink()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        edge = archive.getmember("00010.jpg").offset
    bad = {
        "cut": whole[: edge + 700],
        "noise": whole[:edge] + b"\x07" * 2048,
        "name": whole[:edge] + hostile_name() + bytes(1024),
        "empty": b"",
        "half-gzip": packed[: len(packed) // 2],
    }
    (tmp_path / "bad.tar").write_bytes(bad[damage])
    outcomes_ = found(ShardSettings(source="webdataset", path=str(tmp_path), heldout=0))
    *good, last = outcomes_
    assert last.reason == "broken-tar"
    assert "bad.tar" in last.name
    if damage in ("noise", "name"):
        assert [one.row["id"] for one in good] == [f"{number:05d}" for number in range(10)]


def test_small_tars_share_a_shard_and_a_large_one_is_never_cut(tmp_path: Path) -> None:
    for name, samples in (("a", 2), ("b", 2), ("c", 9), ("d", 2)):
        in_tar(tmp_path, name, wds(samples))
    listing = SOURCES["webdataset"].listing(ShardSettings(source="webdataset", path=str(tmp_path)))
    shards = ["".join(file.key[0] for file in items) for items, _ in listing.shards(8)]
    assert "".join(shards) == "abcd"
    assert {"ab", "c"} <= set(shards)


def test_a_tar_becomes_a_shard_and_the_share_of_refused_samples_is_judged_at_the_end(
    run_in: Any, s3_root: str, tmp_path: Path
) -> None:
    in_tar(tmp_path, "a", wds(6))
    in_tar(tmp_path, "b", {**wds(3, start=6), "x.txt": b"no picture"})
    store = open_store(f"{s3_root}/tars")
    for name in ("a.tar", "b.tar"):
        store.upload(tmp_path / name, name)
    settings = ShardSettings(source="webdataset", path=store.uri, heldout=0, rows_per_shard=2, max_bad=0.11)
    artifact = run_in(Shard(), settings).artifact
    files = sorted(artifact.local().glob("train/*.parquet"))
    assert [pq.read_table(file).column("id").to_pylist() for file in files] == [
        [f"{number:05d}" for number in range(6)], [f"{number:05d}" for number in range(6, 9)]
    ]  # fmt: skip
    assert artifact.manifest.notes["refused"] == {"image-missing": {"count": 1, "ids": ["x"]}}
    with pytest.raises(
        LlavaError, match=r"1 of 10 samples refused, limit shard\.max_bad=0\.09: 1 x image-missing \("
    ):
        run_in(Shard(), settings.model_copy(update={"max_bad": 0.09}), root=tmp_path / "stricter")
