"""95 % intervals by bootstrap over questions, for one score and for the difference of two.

Every score here is a formula of sums over questions (right answers, n-grams, a judge's marks). So one resample of
the questions is a vector of weights, and all resamples are one matrix product. Questions with equal rows are
interchangeable: they are drawn as one group, which makes 200,000 yes/no questions as cheap as four.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Formula = Callable[[Floats], dict[str, Floats]]
"""Sums over questions, shape (..., columns), to scores by name, shape (...); nan where a score is undefined."""

DRAWS = 10_000
SEED = 0
CONFIDENCE = 0.95
_CELLS = 4_000_000
"""Weights that are held at once."""


def point(sums: Floats, formula: Formula) -> dict[str, float]:
    """The scores of all questions; `sums` has shape (questions, columns)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(value) for name, value in formula(sums.sum(axis=0)).items()}


def intervals(
    sums: Floats, formula: Formula, confidence: float = CONFIDENCE, draws: int = DRAWS, seed: int = SEED
) -> dict[str, tuple[float, float]]:
    """The central percentile interval of each score; (nan, nan) where it is undefined in every resample."""
    drawn = _collect(formula(chunk) for chunk in _resampled(sums, draws, seed))
    return {name: _central(values, confidence) for name, values in drawn.items()}


def paired_intervals(
    base: Floats,
    new: Floats,
    formula: Formula,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = SEED,
) -> dict[str, tuple[float, float]]:
    """The interval of new minus base, where row i of both is the same question: both see the same resamples."""
    width = base.shape[1]
    both = np.concatenate([base, new], axis=1)
    drawn = _collect(
        _minus(formula(chunk[:, width:]), formula(chunk[:, :width]))
        for chunk in _resampled(both, draws, seed)
    )
    return {name: _central(values, confidence) for name, values in drawn.items()}


def _resampled(sums: Floats, draws: int, seed: int) -> Iterator[Floats]:
    """Sums of resamples, in chunks of shape (some draws, columns)."""
    rows, counts = np.unique(sums, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    share, size = counts / counts.sum(), max(1, _CELLS // len(rows))
    for start in range(0, draws, size):
        weights = random.multinomial(len(sums), share, size=min(size, draws - start))
        with np.errstate(divide="ignore", invalid="ignore"):
            yield weights.astype(np.float64) @ rows


def _collect(chunks: Iterator[dict[str, Floats]]) -> dict[str, Floats]:
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = list(chunks)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _minus(left: dict[str, Floats], right: dict[str, Floats]) -> dict[str, Floats]:
    return {name: left[name] - right[name] for name in left}


def _central(values: Floats, confidence: float) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN")
        low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
