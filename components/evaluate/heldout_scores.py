"""Exact match per condition and kind of question, from answers as they were given."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TypedDict

from components.evaluate.answering import BLANK, RIGHT, WRONG

CONDITIONS = {
    RIGHT: "exact_match",
    BLANK: "blank_image",
    WRONG: "wrong_image",
}
"""What the model is shown with the question, and the metric that its share of right answers is called.

A model that does not look scores as high without the picture, or with another one, as with it.
"""


class Answered(TypedDict):
    """A line of `answers.jsonl`."""

    id: str
    kind: str
    question: str
    expected: str
    wrong_image_of: str
    """The id of the question whose picture was shown as the wrong one."""
    answers: dict[str, str]
    """By condition."""
    correct: dict[str, bool]
    loss: float | None
    """Negative log-likelihood of the expected answer with the right image, nats, summed over its tokens."""
    tokens: int | None


class Score(TypedDict):
    """Right answers in percent by condition, and of how many questions."""

    n: int
    percent: dict[str, float]


def score(rows: Sequence[Answered]) -> Score:
    """Percent of right answers in `rows`, which must not be empty."""
    return {
        "n": len(rows),
        "percent": {
            condition: 100 * sum(row["correct"][condition] for row in rows) / len(rows)
            for condition in CONDITIONS
        },
    }


def score_by_kind(rows: Sequence[Answered]) -> dict[str, Score]:
    """`score` of each kind of question, by name."""
    groups: dict[str, list[Answered]] = defaultdict(list)
    for row in rows:
        groups[row["kind"]].append(row)
    return {kind: score(groups[kind]) for kind in sorted(groups)}


def held_out_loss(rows: Sequence[Answered]) -> float | None:
    """Mean over all supervised tokens (nats per token); None where no loss was measured."""
    measured = [(row["loss"], row["tokens"]) for row in rows if row["loss"] is not None and row["tokens"]]
    if not measured:
        return None
    return sum(loss for loss, _ in measured) / sum(tokens for _, tokens in measured)


def metrics(rows: Sequence[Answered], benchmark: str) -> dict[str, float]:
    """Every number of the evaluation under its MLflow name; shares in percent."""
    overall = score(rows)
    named = {
        f"eval/{benchmark}/{metric}": overall["percent"][condition]
        for condition, metric in CONDITIONS.items()
    }
    for kind, part in score_by_kind(rows).items():
        # A kind is the dataset's own word; MLflow takes only these characters in a metric's name.
        name = re.sub(r"[^\w.\- ]", "_", kind)
        for condition, metric in CONDITIONS.items():
            named[f"eval/{benchmark}/{name}/{metric}"] = part["percent"][condition]
    loss = held_out_loss(rows)
    if loss is not None:
        named["eval/loss"] = loss
    return named | {"eval/n": float(len(rows))}
