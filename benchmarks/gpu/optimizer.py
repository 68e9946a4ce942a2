"""The fused update against the plain one, both against fp64."""

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.findings import FACTOR, Findings, apart
from benchmarks.training_step.layout import MasterAdamW, MixedAdamW
from llava.training.engine import AdamW, set_rate

UPDATES = 10
SHAPES = ((257, 64), (1000,), (3, 5, 7))
RATE = 1e-2


def check(bench: Bench, findings: Findings) -> None:
    """What ten updates with seeded gradients add to the weights, with and without decay, and through an fp32 copy."""
    for decay in (0.0, 0.1):
        start, gradients = _drawn(bench)
        exact = _updated(start, gradients, decay, torch.float64, fused=False)
        plain = _updated(start, gradients, decay, torch.float32, fused=False)
        fused = _updated(start, gradients, decay, torch.float32, fused=True)
        for number, (found, other, expected) in enumerate(zip(fused, plain, exact, strict=True)):
            # Weights of about 1 and updates of about RATE: their last places are 1 / RATE apart.
            least = 2.0**-24 / RATE
            findings.within(
                f"decay {decay}, tensor {number}",
                apart(found, expected),
                FACTOR * max(apart(other, expected), least),
            )
    _through_copy(bench, findings)
    findings.say(f"{UPDATES} updates; {findings.worst()}")


def _drawn(bench: Bench) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    random = torch.Generator().manual_seed(bench.seed)
    start, *gradients = [
        [torch.randn(shape, generator=random).to(bench.device) for shape in SHAPES]
        for _ in range(UPDATES + 1)
    ]
    return start, gradients


def _updated(
    start: list[torch.Tensor],
    gradients: list[list[torch.Tensor]],
    decay: float,
    dtype: torch.dtype,
    fused: bool,
) -> list[torch.Tensor]:
    """What was added to each tensor, in fp64."""
    named = {f"w{number}": torch.nn.Parameter(one.to(dtype, copy=True)) for number, one in enumerate(start)}
    optimizer = AdamW(weight_decay=decay).build(named) if fused else _plain(named, decay)
    set_rate(optimizer.param_groups, RATE)
    for drawn in gradients:
        for parameter, gradient in zip(named.values(), drawn, strict=True):
            parameter.grad = gradient.to(dtype)
        optimizer.step()
    return [
        parameter.detach().double() - one.double()
        for parameter, one in zip(named.values(), start, strict=True)
    ]


def _plain(named: dict[str, torch.nn.Parameter], decay: float) -> torch.optim.Optimizer:
    """A tensor at a time, with the papers' constants written out; what is no matrix does not decay."""
    groups = [
        {"params": [one], "scale": 1.0, "weight_decay": decay if one.ndim > 1 else 0.0}
        for one in named.values()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)


def _through_copy(bench: Bench, findings: Findings) -> None:
    """bf16 weights learn through an fp32 copy, as in the measurement of the speed."""
    start, gradients = _drawn(bench)
    halves = [one.to(torch.bfloat16) for one in start]
    named = {f"w{number}": torch.nn.Parameter(one.clone()) for number, one in enumerate(halves)}
    optimizer = MixedAdamW().build(named)
    assert isinstance(optimizer, MasterAdamW)
    set_rate(optimizer.param_groups, RATE)
    for drawn in gradients:
        for parameter, gradient in zip(named.values(), drawn, strict=True):
            parameter.grad = gradient.to(torch.bfloat16)
        optimizer.step()
    whole = [[one.to(torch.bfloat16).float() for one in drawn] for drawn in gradients]
    added = _updated([one.float() for one in halves], whole, 0.0, torch.float32, fused=True)
    for (name, parameter), half, more in zip(named.items(), halves, added, strict=True):
        same = torch.equal(parameter, (half.double() + more).to(torch.bfloat16))
        findings.holds(f"bf16 {name} is its fp32 copy, rounded", same, "it is another number")
