"""What all sources share: their settings, and how items become shards."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from components.shard import ShardSettings
from components.shard.sources import base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "parquet", "path": "x"}, "source=parquet needs texts"),
        (
            {"source": "coco", "path": "x", "allow_private": True},
            "allow_private is for source=cc3m, not coco",
        ),
        (
            {"source": "cc3m", "path": "x", "roots": ["y"]},
            "roots is for source=coco and source=llava, not cc3m",
        ),
    ],
)
def test_settings_of_another_source_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ShardSettings(**settings)


def test_items_that_are_files_are_cut_into_shards_by_their_samples() -> None:
    listing = base.Listing(list("abcdef"), sizes=[3, 3, 9, 1, 1, 4])
    assert [("".join(items), samples) for items, samples in listing.shards(6)] == [
        ("ab", 6), ("c", 9), ("def", 6)
    ]  # fmt: skip
