"""Every text has one defined result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.shard import ShardSettings
from tests.support.sources import (
    coco,
    found,
    in_folder,
    photos,
)

# Texts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nul \0 inside", "text-nul"),
        ("half \ud83d of a pair", "text-not-unicode"),
        ("other half \udc00", "text-not-unicode"),
        ("x" * 1_000_000, "text-too-long"),
        ("an <image> in the answer", ""),
        ("</s> [/INST] <|im_end|> ASSISTANT: ###", ""),
        ("a whole pair \U0001f600", ""),
        ("line\r\nline\u2028line\x1b[31m", ""),
        ("\u202ebackwards and ‍ joined", ""),
        ("", ""),
    ],
)
def test_every_text_has_one_defined_result(tmp_path: Path, text: str, reason: str) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]
    (tmp_path / "mix.json").write_text(json.dumps([{"id": "r", "conversations": turns}]))
    (outcome,) = found(ShardSettings(source="llava", path=str(tmp_path), heldout=0))
    if reason:
        assert (outcome.name, outcome.reason) == ("r", reason)
        assert len(str(outcome)) < 500
    else:
        assert outcome.row["conversations"][1]["value"] == text


def test_a_bad_caption_is_left_out_and_counted_and_the_photo_stays_with_the_others(tmp_path: Path) -> None:
    files = photos(3)
    settings = coco(tmp_path / "data", files)
    in_folder(tmp_path / "data", "images", files)
    path = tmp_path / "data" / "annotations" / "captions.json"
    table = json.loads(path.read_text())
    bad = ["\ud800", "a\0b", "word " * 200_000]
    table["annotations"] += [{"image_id": 0, "caption": caption} for caption in bad]
    table["annotations"][1]["caption"] = "\udfff"
    table["annotations"][2]["caption"] = " \n "
    path.write_text(json.dumps(table))
    first, second, third = found(settings)
    assert first.row["captions"] == ["photo 000.jpg"]
    assert sorted(first.counts) == [
        "captions-left-out/text-not-unicode", "captions-left-out/text-nul", "captions-left-out/text-too-long"
    ]  # fmt: skip
    assert (second.reason, third.reason) == ("text-not-unicode", "no-caption")
