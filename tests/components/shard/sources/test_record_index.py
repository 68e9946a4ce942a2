"""The index of records: those of one photo stand together."""

from __future__ import annotations

import json
from pathlib import Path

from components.shard.sources import SOURCES
from tests.support.sources import (
    llava,
)


def test_records_of_one_photo_stand_together_in_the_order_of_the_file(tmp_path: Path) -> None:
    images = ["b.jpg", "a.jpg", None, "b.jpg", ["a.jpg", "b.jpg"], None, "b.jpg"]
    for name in ("mix.json", "mix.jsonl"):
        listing = SOURCES["llava"].listing(llava(tmp_path / name, images, name))
        assert [json.loads(data)["id"] for _, data in listing.items] == [
            "r0",
            "r3",
            "r6",
            "r1",
            "r4",
            "r2",
            "r5",
        ]
        assert [number for number, _ in listing.items[2:5]] == [6, 1, 4]
