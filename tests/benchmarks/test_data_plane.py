"""The benchmarks of the data plane run small, and what they compare is the same on every side."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import reader, shard
from benchmarks.data_plane.photos import files, make_photos
from llava.data.images import decode
from tests.support.repository import REPOSITORY

ROOT = REPOSITORY


def test_both_ways_to_shards_hold_the_photos_with_their_own_bytes(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 12, (64, 48))
    listed = list(files(tmp_path / "photos", 12))
    for side in (shard.ours_checked, shard.ours_as_it_comes):
        (out := tmp_path / side.__name__).mkdir()
        side(tmp_path / "photos", out, listed)
        rows = [row for path in sorted(out.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        expected = [(name, path.read_bytes(), texts) for name, path, texts in listed]
        assert [(row["id"], row["image"]["bytes"], row["captions"]) for row in rows] == expected


def test_our_reader_gives_every_picture_once_as_the_stock_processor_makes_it(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 20, reader.SIZE)
    reader.make_shards(tmp_path / "shards", tmp_path / "photos", 20)
    stock = reader._stock_pixels()
    expected = {stock(decode(path.read_bytes())).tobytes() for _, path, _ in files(tmp_path / "photos", 20)}
    found = list(reader.ours(str(tmp_path / "shards"), 20))
    assert len(found) == len(expected) == 20
    assert {np.ascontiguousarray(picture).tobytes() for picture in found} == expected


def test_a_side_runs_alone_and_prints_its_figures(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 10, (64, 48))
    (tmp_path / "out").mkdir()
    run = subprocess.run(
        [sys.executable, "benchmarks/shard.py", "--side", "datasets, checked", "--images", "10",
         "--photos", str(tmp_path / "photos"), "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = json.loads(run.stdout.splitlines()[-1])
    assert printed["images"] == 10
    assert min(printed[key] for key in ("wall", "cpu", "peak", "written")) > 0
