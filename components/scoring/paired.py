"""Two models on the same questions: what one gains on the other, how sure that is, and which answers changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from components.scoring.base import Scored, Unit
from components.scoring.bootstrap import CONFIDENCE, DRAWS, paired_intervals, point
from llava.errors import RefusedInput


class OtherQuestions(RefusedInput):
    """The two answered other questions, or the same ones with other labels."""


@dataclass(frozen=True)
class Difference:
    """One score of both models, and the interval of new minus base."""

    base: float
    new: float
    low: float
    high: float

    @property
    def gain(self) -> float:
        """New minus base."""
        return self.new - self.base


@dataclass(frozen=True)
class Comparison:
    """What a paired bootstrap over the questions says; scores are over the questions that both were judged on."""

    benchmark: str
    n: int
    left_out: int
    """Questions on which one of the two has no judgement."""
    wins: int
    ties: int
    losses: int
    confidence: float
    differences: dict[str, Difference]
    changed: Sequence[tuple[Unit, Unit]]
    """(base, new) where one is better, the greatest gains first and the greatest losses last."""


def compare(base: Scored, new: Scored, confidence: float = CONFIDENCE, draws: int = DRAWS) -> Comparison:
    """Both on the same resamples of the questions; raises `OtherQuestions` where these differ."""
    order = _same_questions(base, new)
    new_units, new_sums = [new.units[index] for index in order], new.sums[order]
    both = np.isfinite(base.values) & np.isfinite(new.values[order])
    if not both.any():
        raise RefusedInput(f"{base.benchmark}: no question was judged for both models")
    kept = np.flatnonzero(both).tolist()
    base_sums, new_sums = base.sums[kept], new_sums[kept]
    pairs = [(base.units[index], new_units[index]) for index in kept]
    gains = np.array([after.value - before.value for before, after in pairs])
    low_high = paired_intervals(base_sums, new_sums, base.formula, confidence, draws)
    old_scores, new_scores = point(base_sums, base.formula), point(new_sums, new.formula)
    return Comparison(
        benchmark=base.benchmark,
        n=len(pairs),
        left_out=len(order) - len(pairs),
        wins=int((gains > 0).sum()),
        ties=int((gains == 0).sum()),
        losses=int((gains < 0).sum()),
        confidence=confidence,
        differences={
            name: Difference(old_scores[name], new_scores[name], *low_high[name]) for name in old_scores
        },
        changed=[pairs[index] for index in np.argsort(-gains, kind="stable") if gains[index] != 0],
    )


def _same_questions(base: Scored, new: Scored) -> list[int]:
    """For each unit of `base` the place of the same one in `new`."""
    if base.benchmark != new.benchmark:
        raise OtherQuestions(f"{base.benchmark} and {new.benchmark} are different benchmarks")
    if base.sums.shape[1] != new.sums.shape[1] or list(base.scores) != list(new.scores):
        raise OtherQuestions(
            f"{base.benchmark}: the two were not judged alike ({base.sums.shape[1]} sums a question against "
            f"{new.sums.shape[1]}): give both the same number of judge runs and rounds"
        )
    indices = {unit.key: index for index, unit in enumerate(new.units)}
    mine = {unit.key for unit in base.units}
    only_base, only_new = len(mine - indices.keys()), len(indices.keys() - mine)
    if only_base or only_new:
        raise OtherQuestions(
            f"{base.benchmark}: the questions or their labels differ: {only_base:,} of {len(mine):,} only in the "
            f"first, {only_new:,} of {len(indices):,} only in the second; answer the same questions with both models"
        )
    return [indices[unit.key] for unit in base.units]
