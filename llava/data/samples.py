"""What one dataset row gives to train on: the views of stage 1 and stage 2."""

from collections.abc import Callable
from typing import Any

from llava.text_tokenizer import IMAGE

Turns = list[dict[str, str]]


def caption_samples(row: dict[str, Any]) -> list[Turns]:
    """Stage 1: each caption is a sample of its own (v1, section 4.2; the question text is not used).

    The ecosystem publishes captions as conversations of one turn: there the answer is the caption.
    """
    if row.get("image") is None:
        return []
    captions, turns = row["captions"] or [], row["conversations"] or []
    if not captions and len(turns) == 2:
        captions = [turns[1]["value"]]
    return [[{"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}] for caption in captions]


def conversation_samples(row: dict[str, Any]) -> list[Turns]:
    """Stage 2: the row's conversation."""
    return [row["conversations"]] if row["conversations"] else []


VIEWS: dict[str, tuple[Callable[[dict[str, Any]], list[Turns]], tuple[str, ...]]] = {
    "captions": (caption_samples, ("id", "image", "captions", "conversations")),
    "conversations": (conversation_samples, ("id", "image", "more_images", "conversations")),
}
"""Name of the view -> its function and the columns that it reads; a caption tells of the first picture."""
