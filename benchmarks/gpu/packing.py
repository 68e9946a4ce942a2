"""Packed rows against samples alone, through our model and through stock LLaVA."""

import torch

from benchmarks.gpu.bench import PRECISIONS, Bench
from benchmarks.gpu.compared import compare
from benchmarks.gpu.findings import Findings

ALONE = 1
"""A budget of tokens that gives each sample a row of its own."""


def check(bench: Bench, findings: Findings) -> None:
    """Loss, states and gradients of both stages; a row without anything to learn gives zero."""
    samples = 0
    for stage in (1, 2):
        reference = bench.stock_gradients(bench.module(torch.float32, stage), stage=stage)
        for dtype, precision in PRECISIONS.items():
            module = bench.module(dtype, stage)
            plain = bench.stock_gradients(module, stage=stage) if dtype != torch.float32 else None
            # The stock way sets stock attention while it runs; ours is what the module was made with.
            for tokens, what in ((None, "packed"), (ALONE, "alone")):
                step = bench.rows(tokens, stage)
                found = bench.gradients(module, step)
                compare(findings, f"stage {stage} {what}", found, reference, dtype, plain)
                samples = len(step.ids)
            _blank(bench, findings, module, f"stage {stage}, {precision}", stage)
        bench.release()
    packed = bench.rows()
    findings.say(
        f"{samples} samples in {len(packed.rows)} rows against stock LLaVA, one sample at a time; {findings.worst()}"
    )


def _blank(bench: Bench, findings: Findings, module: torch.nn.Module, what: str, stage: int) -> None:
    """The row that a rank computes where it has nothing left: every part takes part, nothing is learned."""
    row = bench.collator(stage=stage).blank_row().to(bench.device)
    module.zero_grad()
    loss = module(row)
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    nothing = loss.item() == 0 and all(grad is not None and not grad.any() for grad in gradients)
    findings.holds(f"{what}: a blank row has no loss and no gradient", nothing, f"its loss is {loss.item()}")
    module.zero_grad()
