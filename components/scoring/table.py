"""The table of scores that reports and pages show."""

from __future__ import annotations

import math
from collections.abc import Mapping

from components.scoring import bootstrap
from components.scoring.benchmarks import Scored, find


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
                find(found[benchmark].benchmark).digits,
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
