"""The gate: may a new model take the champion's place? A rule in the config, a decision, and its reason in one line.

The new model has to gain more than `minimum_difference` on each deciding score, surely: the lower end of the paired
interval must lie above it. And no floor may be undercut, whatever was gained elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field, field_validator

from components.contract import Settings
from components.scoring.base import Scored
from components.scoring.bootstrap import DRAWS
from components.scoring.paired import Comparison, OtherQuestions, compare
from llava.errors import RefusedInput

_Scores = TypeVar("_Scores", tuple[str, ...], dict[str, float])


class GateSettings(Settings):
    """What it takes to become champion; a score is named BENCHMARK/SCORE, such as `pope/mean_f1`."""

    benchmarks: tuple[str, ...] = Field(
        ("vqa/exact_match",), min_length=1, description="The scores that decide: each must be gained on"
    )
    minimum_difference: float = Field(
        0.0, ge=0, description="A gain counts only above this, in the score's own unit"
    )
    confidence: float = Field(
        0.95, gt=0, lt=1, description="Width of the paired interval whose lower end must lie above that"
    )
    floors: dict[str, float] = Field(
        default_factory=dict, description="Scores that the new model must reach, whatever it gains elsewhere"
    )
    draws: int = Field(DRAWS, ge=100, description="Resamples of the questions")

    @field_validator("benchmarks", "floors")
    @classmethod
    def _named_whole(cls, scores: _Scores) -> _Scores:
        for name in scores:
            if not all(name.partition("/")):
                raise ValueError(f"{name!r} is no score: write BENCHMARK/SCORE, such as pope/mean_f1")
        return scores


@dataclass(frozen=True)
class Verdict:
    """Whether the new model is promoted, why, and the comparisons that were made."""

    promote: bool
    reason: str
    comparisons: Mapping[str, Comparison]


def decide(settings: GateSettings, base: Mapping[str, Scored], new: Mapping[str, Scored]) -> Verdict:
    """The rule on both models' outcomes by benchmark; other questions are no promotion, and the reason says so.

    Raises `RefusedInput` where the rule names a score that was not measured.
    """
    for name in (*settings.benchmarks, *settings.floors):
        _score(name, new)
    for name in settings.benchmarks:
        _score(name, base)
    comparisons: dict[str, Comparison] = {}
    try:
        for benchmark in dict.fromkeys(name.partition("/")[0] for name in settings.benchmarks):
            comparisons[benchmark] = compare(
                base[benchmark], new[benchmark], settings.confidence, settings.draws
            )
    except OtherQuestions as error:
        return Verdict(False, f"refused: not comparable: {error}", comparisons)
    under = under_floors(settings, new)
    outcomes = [_outcome(name, comparisons, settings) for name in settings.benchmarks]
    said = [sentence for _, sentence in outcomes]
    if under:
        return Verdict(False, "floor undercut: " + "; ".join(under + said), comparisons)
    return Verdict(all(better for better, _ in outcomes), "; ".join(said), comparisons)


def under_floors(settings: GateSettings, new: Mapping[str, Scored]) -> list[str]:
    """A sentence for each floor that is undercut; an undefined score undercuts any."""
    return [
        f"{name} {_score(name, new):.2f} is under its floor {floor:g}"
        for name, floor in settings.floors.items()
        if not _score(name, new) >= floor
    ]


def _outcome(name: str, comparisons: Mapping[str, Comparison], settings: GateSettings) -> tuple[bool, str]:
    """Whether `name` is surely gained on, and the sentence that says how much."""
    benchmark, _, score = name.partition("/")
    comparison = comparisons[benchmark]
    found, least = comparison.differences[score], settings.minimum_difference
    if found.low > least:
        word = "better"
    elif found.high < -least:
        word = "worse"
    elif found.low > 0:
        word = f"better, but not surely by more than {least:g}"
    elif math.isnan(found.gain):
        word = "undefined"
    else:
        word = "equal within noise"
    return word == "better", (
        f"{name} {found.new:.2f} against {found.base:.2f}, {found.gain:+.2f} [{found.low:+.2f}, {found.high:+.2f}] at "
        f"{100 * settings.confidence:g} % on {comparison.n:,} questions ({comparison.wins:,} better, "
        f"{comparison.losses:,} worse): {word}"
    )


def _score(name: str, outcomes: Mapping[str, Scored]) -> float:
    benchmark, _, score = name.partition("/")
    scored = outcomes.get(benchmark)
    scores = {} if scored is None else scored.scores
    if score not in scores:
        known = [f"{one}/{each}" for one, outcome in outcomes.items() for each in outcome.scores]
        raise RefusedInput(
            f"the gate names {name!r}, which was not measured; known: {', '.join(known) or 'none'}"
        )
    return scores[score]
