"""Two results of the same global batch held against each other, by the rule of their precision.

In fp32 the tolerances are those of `benchmarks/train_step.py`. In bf16 the reference is fp32 with the same weights, and
ours may be `FACTOR` times as far from it as the plain computation in bf16 is: a sample alone through stock LLaVA.
"""

import statistics

import torch

from benchmarks.gpu.bench import PRECISIONS, Gradients
from benchmarks.gpu.findings import EPSILON, MEAN, Findings, allowed, apart
from benchmarks.train_step import GRADIENT, LOSS


def compare(
    findings: Findings,
    what: str,
    found: Gradients,
    reference: Gradients,
    dtype: torch.dtype,
    plain: Gradients | None = None,
) -> None:
    """Loss, states and gradients of `found`; `plain` is needed in bf16 and is as `reference`, in bf16."""
    name = f"{what}, {PRECISIONS[dtype]}"
    lossy = None if plain is None else abs(plain.loss / reference.loss - 1)
    findings.within(
        f"{name}: loss",
        abs(found.loss / reference.loss - 1),
        LOSS if lossy is None else allowed(lossy, MEAN),
    )
    for kind in ("hidden", "named"):
        ours, expected = getattr(found, kind), getattr(reference, kind)
        same = ours.keys() == expected.keys()
        word = {"hidden": "states", "named": "gradients"}[kind]
        findings.holds(f"{name}: {word} of the same names", same, "some are missing or new")
        if same and ours:
            findings.within(f"{name}: {word}", *_worst(ours, expected, dtype, getattr(plain, kind, None)))


def _worst(
    ours: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    dtype: torch.dtype,
    plain: dict[str, torch.Tensor] | None,
) -> tuple[float, float]:
    """Error and what is allowed, where the two are the closest."""
    errors = {name: apart(value, expected[name]) for name, value in ours.items()}
    if plain is None:
        return max(errors.values()), GRADIENT
    lossy = {name: apart(plain[name], expected[name]) for name in errors}
    # A parameter whose plain gradient happens to be exact is no measure of what bf16 costs.
    usual = statistics.median(lossy.values())
    pairs = [(errors[name], allowed(max(lossy[name], usual), EPSILON[dtype])) for name in errors]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def same_bits(findings: Findings, what: str, found: Gradients, expected: Gradients) -> bool:
    """Whether loss and gradients are the very same numbers; recorded, not judged."""
    same = found.loss == expected.loss and all(
        torch.equal(value, expected.named[name]) for name, value in found.named.items()
    )
    findings.figures.setdefault("same_bits", {})[what] = same
    return same
