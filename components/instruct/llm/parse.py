"""From a teacher's text to turns: `Question:` and `Answer:` blocks between lines of `===`; a description is bare."""

from __future__ import annotations

import re
from typing import NamedTuple

REFUSAL = re.compile(
    r"^\W*(?:i['’]?m (?:very |so )?sorry|i am (?:very |so )?sorry|sorry\b|i (?:cannot|can['’]?t|can not)\b|"
    r"i['’]?m (?:not able|unable)|i am (?:not able|unable)|unfortunately,? i\b|i won['’]?t\b|i must decline)|"
    r"\bas an ai\b|\bas a (?:large )?language model\b|\bi (?:cannot|can['’]?t|do not|don['’]?t) (?:actually )?see\b|"
    r"\bno (?:image|picture|photo) (?:was|is|has been) (?:provided|attached)\b",
    re.I,
)
_LINE = re.compile(r"^[ \t]*={3,}[ \t]*$", re.M)
_HEAD = re.compile(r"^\W*(question|answer)[ \t]*+\**+[ \t]*+:[ \t]*\**", re.I)
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.S)
_FENCE = re.compile(r"^\s*```\w*\n(.*)\n```\s*$", re.S)


class Unusable(Exception):
    """An answer that gives no sample. `reason` is counted, the text tells a reader more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Pair(NamedTuple):
    """A question (empty for a description) and its answer."""

    question: str
    answer: str


def parse(kind: str, text: str, finish_reason: str | None) -> list[Pair]:
    """The pairs in a teacher's text; raises Unusable with the reason where it has not the form asked for.

    Text that a model wrote while thinking and a fence around everything are taken off.
    """
    text = _THOUGHT.sub("", text)
    if fenced := _FENCE.match(text):
        text = fenced[1]
    text = text.strip()
    if finish_reason == "content_filter":
        raise Unusable("refusal", "stopped by the endpoint's content filter")
    if not text:
        raise Unusable("empty")
    if finish_reason == "length":
        raise Unusable("cut-off", "finish_reason is length")
    if REFUSAL.search(text):
        raise Unusable("refusal", text[:80])
    if kind == "detail":
        if _LINE.search(text) or _HEAD.match(text):
            raise Unusable("malformed", "a description with parts of a conversation in it")
        return [Pair("", text)]
    pairs = _pairs(text)
    if kind == "reasoning" and len(pairs) != 1:
        raise Unusable("malformed", f"{len(pairs)} questions instead of one")
    return pairs


def _pairs(text: str) -> list[Pair]:
    blocks = [block for part in _LINE.split(text) if (block := part.strip())]
    spoken: list[tuple[str, str]] = []
    for block in blocks:
        head = _HEAD.match(block)
        if head is None:
            raise Unusable("malformed", f"a part that is neither question nor answer: {block[:60]!r}")
        spoken.append((head[1].lower(), block[head.end() :].strip()))
    if [role for role, _ in spoken] != ["question", "answer"] * (len(spoken) // 2):
        raise Unusable("roles", " ".join(role for role, _ in spoken))
    if not all(said for _, said in spoken):
        raise Unusable("empty", "a question or an answer without text")
    questions, answers = spoken[::2], spoken[1::2]
    return [Pair(asked, told) for (_, asked), (_, told) in zip(questions, answers, strict=True)]
