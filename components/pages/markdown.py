"""Markdown for pages that show what models and people wrote: text stays text, whatever it contains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate import bootstrap
from components.evaluate.benchmarks import Scored

_DIGITS = {"captions": 3}
"""Behind the point, where scores go from 0 to 1."""
_ACTIVE = re.compile(r"[\\`*_\[\]<>|~$&!#@:]|(?<=www)\.", re.I)


def escape(text: object) -> str:
    """On one line, and so that no renderer finds markup, HTML, links, formulas or a new table cell in it."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", line)


def table(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The lines of a table; cells and heads are escaped, a `Markup` cell stands as it is."""

    def line(cells: Sequence[Any]) -> str:
        shown = (cell.text if isinstance(cell, Markup) else escape(cell) for cell in cells)
        return "| " + " | ".join(shown) + " |"

    return [
        line(list(columns)),
        "| " + " | ".join("---" for _ in columns) + " |",
        *map(line, zip(*columns.values(), strict=True)),
    ]


class Markup:
    """A cell that is Markdown already."""

    def __init__(self, text: str) -> None:
        self.text = text


def scores_table(models: Mapping[str, Mapping[str, Scored]]) -> dict[str, list[str]]:
    """Columns: the score (BENCHMARK/SCORE), questions, and each model's value with its 95 % interval.

    `models`: outcomes by benchmark, by model; a model that has no such score gets an empty cell, and a score that no
    model has (such as one of a category without questions) no line.
    """
    names: dict[str, dict[str, None]] = {}
    for found in models.values():
        for benchmark, scored in found.items():
            names.setdefault(benchmark, {}).update(dict.fromkeys(scored.scores))
    rows = [
        (benchmark, score)
        for benchmark, scores in names.items()
        for score in scores
        if any(
            math.isfinite(found[benchmark].scores.get(score, math.nan))
            for found in models.values()
            if benchmark in found
        )
    ]
    columns: dict[str, list[str]] = {
        "score": [f"{benchmark}/{score}" for benchmark, score in rows],
        "questions": [
            f"{next(found[benchmark].n for found in models.values() if benchmark in found):,}"
            for benchmark, _ in rows
        ],
    }
    for model, found in models.items():
        ranges = {name: bootstrap.intervals(scored.sums, scored.formula) for name, scored in found.items()}
        columns[model] = [
            number(
                found[benchmark].scores[score],
                ranges[benchmark][score],
                _DIGITS.get(found[benchmark].benchmark, 1),
            )
            if benchmark in found and score in found[benchmark].scores
            else ""
            for benchmark, score in rows
        ]
    return columns


def number(value: float, interval: tuple[float, float], digits: int) -> str:
    """A score with its interval."""
    if math.isnan(value):
        return "undefined"
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
