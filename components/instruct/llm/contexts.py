"""Symbolic contexts: what a text-only teacher reads in place of the picture, and what the checks know about it.

| what | rule |
|---|---|
| captions | one a line; the same caption once, at most 10, each cut at 400 characters |
| boxes | `category: [x1, y1, x2, y2]`, shares of width and height with 3 decimals, clipped to the picture |
| duplicates | boxes of one category that overlap by an IoU of 0.9 or more are one object |
| tiny boxes | under 0.0005 of the picture's area (8 x 8 px of 336 x 336) are left out |
| crowds | of each category the 12 largest are listed, the others as `category: and 7 more, smaller` |
| order | categories as they first appear, in each the largest first |
| text | one line, no control characters; angle and square brackets become round ones |

The last rule is what keeps data data: a caption cannot begin a line of its own, forge a box, or hold what a chat
template of the teacher (`<|im_start|>`, `[INST]`) or of the student (`<image>`, `</s>`) gives a meaning to.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llava.data.schema import Row

CAPTIONS = 10
CAPTION_LENGTH = 400
CROWD = 12
SAME_OBJECT = 0.9
TINY = 0.0005

_BRACKETS = str.maketrans("<>[]", "()()")


class RelativeBox(NamedTuple):
    """Edges as shares of the picture's width and height, from the upper left corner."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def area(self) -> float:
        """Share of the picture."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)


@dataclass(frozen=True)
class Facts:
    """What is known about one picture. `boxes` None: nobody looked for objects."""

    captions: tuple[str, ...]
    boxes: dict[str, list[RelativeBox]] | None
    notes: Counter[str]
    """What the rules changed, such as `duplicate boxes`: how often."""

    @property
    def counts(self) -> dict[str, int] | None:
        """Objects of each category, tiny ones counted, duplicates not; None where unknown."""
        return None if self.boxes is None else {name: len(found) for name, found in self.boxes.items()}


def facts(row: Row) -> Facts:
    """Captions and boxes of a dataset's row, after the rules for text and duplicates."""
    notes: Counter[str] = Counter()
    captions = {text.casefold(): text for text in map(harmless, reversed(row["captions"])) if text}
    kept = [text[:CAPTION_LENGTH] for text in reversed(captions.values())][:CAPTIONS]
    notes["captions left out or cut"] = len(row["captions"]) - sum(text in captions.values() for text in kept)
    boxes: dict[str, list[RelativeBox]] | None = None
    if row["objects"] is not None and row["width"] > 0 and row["height"] > 0:
        boxes = {}
        for one in row["objects"]:
            box = _shares(one["bbox"], row["width"], row["height"])
            if category := harmless(one["category"]):
                boxes.setdefault(category, []).append(box)
        for category, found in boxes.items():
            boxes[category] = _distinct(sorted(found, key=lambda box: -box.area))
            notes["duplicate boxes"] += len(found) - len(boxes[category])
    return Facts(tuple(kept), boxes, +notes)


def context(known: Facts, with_boxes: bool) -> str:
    """The text that the teacher reads: captions, and where wanted the objects, under headings of their own."""
    lines = ["Captions:", *(f"- {caption}" for caption in known.captions)]
    if not with_boxes:
        return "\n".join(lines)
    if known.boxes is None:
        return "\n".join([*lines, "", "Objects: not known"])
    listed = [line for category, boxes in known.boxes.items() for line in _lines(category, boxes)]
    return "\n".join([*lines, "", *(["Objects:", *listed] if listed else ["Objects: none"])])


def tiny_boxes(known: Facts) -> int:
    """How many boxes the rule for tiny ones leaves out."""
    return sum(box.area < TINY for boxes in (known.boxes or {}).values() for box in boxes)


def harmless(text: str) -> str:
    """The text on one line, without control characters and without brackets that a template could mean."""
    kept = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    return " ".join(kept.translate(_BRACKETS).split())


def _lines(category: str, boxes: Sequence[RelativeBox]) -> list[str]:
    seen = [box for box in boxes if box.area >= TINY]
    lines = [f"{category}: [{', '.join(f'{edge:.3f}' for edge in box)}]" for box in seen[:CROWD]]
    more = len(seen) - len(lines)
    return [*lines, f"{category}: and {more} more, smaller"] if more > 0 else lines


def _shares(bbox: Sequence[float], width: int, height: int) -> RelativeBox:
    x, y, w, h = bbox
    x1, x2 = (min(1.0, max(0.0, edge / width)) for edge in (x, x + w))
    y1, y2 = (min(1.0, max(0.0, edge / height)) for edge in (y, y + h))
    return RelativeBox(x1, y1, x2, y2)


def _distinct(boxes: Sequence[RelativeBox]) -> list[RelativeBox]:
    """The boxes without those that lie on one before them."""
    kept: list[RelativeBox] = []
    for box in boxes:
        if not any(_overlap(box, other) >= SAME_OBJECT for other in kept):
            kept.append(box)
    return kept


def _overlap(a: RelativeBox, b: RelativeBox) -> float:
    """Intersection over union."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (a.area + b.area - width * height)
