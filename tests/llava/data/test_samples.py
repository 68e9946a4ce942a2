"""What a row gives to train on."""

from typing import Any

import pytest

from llava.data.samples import VIEWS

ASKED, TOLD = {"from": "human", "value": "<image>\nSay briefly."}, {"from": "gpt", "value": "A red bus."}
PICTURE = {"bytes": b"", "path": "a.jpg"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": PICTURE, "captions": ["A bus.", "Red."], "conversations": None}, ["A bus.", "Red."]),
        ({"image": PICTURE, "captions": ["A bus."], "conversations": [ASKED, TOLD]}, ["A bus."]),
        ({"image": PICTURE, "captions": [], "conversations": [ASKED, TOLD]}, ["A red bus."]),
        ({"image": PICTURE, "captions": None, "conversations": [ASKED, TOLD, ASKED, TOLD]}, []),
        ({"image": None, "captions": ["A bus."], "conversations": [ASKED, TOLD]}, []),
    ],
)
def test_stage_1_learns_captions_or_answers_of_one_turn(row: dict[str, Any], expected: list[str]) -> None:
    view, columns = VIEWS["captions"]
    assert [turns[1]["value"] for turns in view(row)] == expected
    assert [turns[0]["value"] for turns in view(row)] == ["<image>"] * len(expected)
    assert set(row) <= set(columns)
