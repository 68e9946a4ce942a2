"""What one dataset row gives to train on: the views of stage 1 and stage 2."""

import zlib
from collections.abc import Callable
from typing import Any

from llava.text_tokenizer import IMAGE

Turns = list[dict[str, str]]

BRIEF_REQUESTS: tuple[str, ...] = (
    "Say briefly what this picture shows.",
    "What is to be seen here, in one sentence?",
    "Sum up the picture in a few words.",
    "Give a short account of the picture.",
    "Tell me in brief what is in this picture.",
    "Write one short sentence about this picture.",
    "What does this picture show? Keep it short.",
    "Put the content of the picture into one sentence.",
    "Provide a one-line summary of this picture.",
    "How would you put this picture into a few words?",
    "Name the main content of this picture briefly.",
    "Give a quick summary of what you see.",
)
"""For a caption that nobody asked for; v1, table 11 has eleven of the kind."""


def caption_samples(row: dict[str, Any]) -> list[Turns]:
    """Stage 1: each caption is a sample of its own, the answer to a request for a brief description (v1, section 4.2).

    The ecosystem publishes captions as conversations of one turn: there the question is the request, the answer the
    caption. Template `plain` writes no request.
    """
    if row.get("image") is None:
        return []
    captions, turns = row["captions"] or [], row["conversations"] or []
    if not captions and len(turns) == 2:
        return [[{**turns[0], "value": _with_slot(turns[0]["value"])}, turns[1]]]
    return [
        [
            {"from": "human", "value": _with_slot(_request(f"{row.get('id')} {number}"))},
            {"from": "gpt", "value": caption},
        ]
        for number, caption in enumerate(captions)
    ]


def _request(name: str) -> str:
    """One of `BRIEF_REQUESTS`, always the same for the same name."""
    return BRIEF_REQUESTS[zlib.crc32(name.encode(errors="replace")) % len(BRIEF_REQUESTS)]


def _with_slot(question: str) -> str:
    return question if IMAGE in question else f"{IMAGE}\n{question}"


def conversation_samples(row: dict[str, Any]) -> list[Turns]:
    """Stage 2: the row's conversation."""
    return [row["conversations"]] if row["conversations"] else []


VIEWS: dict[str, tuple[Callable[[dict[str, Any]], list[Turns]], tuple[str, ...]]] = {
    "captions": (caption_samples, ("id", "image", "captions", "conversations")),
    "conversations": (conversation_samples, ("id", "image", "more_images", "conversations")),
}
"""Name of the view -> its function and the columns that it reads; a caption tells of the first picture."""
