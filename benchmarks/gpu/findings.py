"""What a step found: figures, and every comparison with what it may differ by."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

FACTOR = 2.0
"""How many times the error of the plain computation ours may have, both in half precision.

Two kernels round in different places, so their errors are of one size and not equal. FlashAttention's own tests allow
the same factor over the error of plain torch.
"""
EPSILON = {torch.float32: 5e-6, torch.bfloat16: 2.0**-8}
"""What is no fault however exact the plain computation is. bf16: one rounding, half a unit in the last place. fp32:
about eighty of them, since kernels add in orders of their own."""
MEAN = 2.0**-10
"""The same for a loss in bf16, the mean over hundreds of tokens: a quarter of one rounding."""


class LeftOut(Exception):
    """A step that cannot run here; the reason."""


class OutOfTime(Exception):
    """The budget ended while the step ran."""


@dataclass
class Findings:
    """Filled by a step while it runs, so that one that ends early has told what it knew."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    parts_left_out: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """For the step's line."""

    def within(self, what: str, error: float, allowed: float) -> None:
        """`error` must be a number and no more than `allowed`."""
        comparisons = self.figures.setdefault("comparisons", {})
        comparisons[what] = {"error": error, "allowed": allowed}
        if not error <= allowed:
            self.faults.append(f"{what}: off by {error:.2g}, allowed is {allowed:.2g}")

    def holds(self, what: str, true: bool, otherwise: str) -> None:
        """`what` must be so; `otherwise` says how it is."""
        self.figures.setdefault("holds", {})[what] = true
        if not true:
            self.faults.append(f"{what}: {otherwise}")

    def without(self, part: str, why: str) -> None:
        """A part of the step that cannot run here."""
        self.parts_left_out.append(f"{part}: {why}")

    def say(self, text: str) -> None:
        """Onto the step's line."""
        self.said.append(text)

    def worst(self) -> str:
        """The comparison that came the closest to what is allowed, for the step's line."""
        found = self.figures.get("comparisons", {})
        if not found:
            return ""
        share = {what: each["error"] / each["allowed"] for what, each in found.items() if each["allowed"]}
        what = max(share, key=lambda name: share[name])
        error, allowed = found[what].values()
        return f"{len(found)} comparisons, the closest {what}: {error:.1e} of {allowed:.1e}"


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, in fp64; infinite where one is no number or has another shape."""
    if found.shape != expected.shape:
        return math.inf
    one, other = found.detach().double(), expected.detach().double()
    off, size = float((one - other).norm()), float(other.norm())
    if not math.isfinite(off) or not math.isfinite(size):
        return math.inf
    return off / size if size else (0.0 if off == 0 else math.inf)


def allowed(plain: float, least: float) -> float:
    """What ours may be off by where the plain computation in the same precision is off by `plain`."""
    return FACTOR * max(plain, least)
