"""Option letters in an answer, by the rule that ScienceQA's published scores were read with."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SENTENCE = re.compile(r"The answer is ([A-Z])\.")


def letter(answer: str) -> str | None:
    """The letter that `answer` gives, or None.

    It is the whole answer, or it opens the answer before ". ", or it stands in the one sentence
    "The answer is X."; two such sentences are no answer. No blank is removed and no case changed.
    """
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = _SENTENCE.findall(answer)
    return found[0] if len(found) == 1 else None


def options(choices: list[str]) -> str:
    """The options on one line, each with its letter in brackets."""
    return " ".join(f"({name}) {text}" for name, text in zip(LETTERS, choices, strict=False))
