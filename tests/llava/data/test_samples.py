"""What a row gives to train on."""

from typing import Any

import pytest

from llava.conversation import Encoder
from llava.data.samples import BRIEF_REQUESTS, VIEWS
from tests.support.tokenizer_kinds import tokenizer_of

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
    assert [turns[0]["value"].count("<image>") for turns in view(row)] == [1] * len(expected)
    assert set(row) <= set(columns)


def test_a_caption_answers_its_own_request_or_one_of_the_list() -> None:
    view, _ = VIEWS["captions"]
    row = {"id": "7", "image": PICTURE, "captions": None, "conversations": [ASKED, TOLD]}
    assert view(row) == [[ASKED, TOLD]]
    without_slot = {**row, "conversations": [{**ASKED, "value": "Say briefly."}, TOLD]}
    assert view(without_slot) == [[ASKED, TOLD]]
    rows = [
        {"id": str(n), "image": PICTURE, "captions": ["A.", "B."], "conversations": None} for n in range(60)
    ]
    asked = [turns[0]["value"] for row in rows for turns in view(row)]
    assert set(asked) == {f"<image>\n{request}" for request in BRIEF_REQUESTS}
    assert asked == [turns[0]["value"] for row in rows for turns in view(row)]


def test_the_plain_template_writes_no_request_and_a_chat_template_does() -> None:
    tokenizer, (turns,) = (
        tokenizer_of("bytes"),
        VIEWS["captions"][0]({"image": PICTURE, "captions": None, "conversations": [ASKED, TOLD]}),
    )
    plain = Encoder(tokenizer, "plain", 2).encode(turns, 1)
    assert plain == Encoder(tokenizer, "plain", 2).encode([{**ASKED, "value": "<image>"}, TOLD], 1)
    assert "Say briefly." in tokenizer.decode(Encoder(tokenizer, "v1", 2).encode(turns, 1).ids)
