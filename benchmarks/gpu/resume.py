"""Save and restore: an interrupted run ends with the bits of one that was not."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.bench import PRECISIONS, Bench
from benchmarks.gpu.findings import Findings
from llava.training import checkpoint
from llava.training.engine import AdamW, Engine, PlainEngine

RATE = 1e-3
Trained = dict[str, torch.Tensor]


def check(bench: Bench, findings: Findings) -> None:
    """Two steps, save, two more; another model and optimizer restored from the files take the same two."""
    with one_order():
        for dtype, precision in PRECISIONS.items():
            engine = _engine(bench, dtype)
            steps(bench, engine, 0, 2)
            folder = bench.folder / f"saved-{precision}"
            checkpoint.save(folder, engine, checkpoint.Position(2, {}, engine.updates))
            expected = steps(bench, engine, 2, 4)
            control = _engine(bench, dtype)
            steps(bench, control, 0, 2)
            repeated = differing(steps(bench, control, 2, 4), expected)
            findings.holds(
                f"{precision}: a run repeats itself", not repeated, f"{len(repeated)} tensors differ"
            )
            other = _engine(bench, dtype)
            restore(other, folder)
            lost = differing(steps(bench, other, 2, 4), expected)
            findings.holds(
                f"{precision}: the bits after a restore", not lost, f"{len(lost)} tensors differ: {lost[:3]}"
            )
            findings.figures.setdefault("tensors", {})[precision] = len(expected)
    findings.say("weights and both moments after 2 + 2 steps, restored from files in between")


def _engine(bench: Bench, dtype: torch.dtype) -> PlainEngine:
    return PlainEngine(bench.module(dtype), AdamW(weight_decay=0.01), gradient_clipping=1.0)


def steps(bench: Bench, engine: Engine, first: int, last: int) -> Trained:
    """Global batches `first` to `last` (not included); returns all that trains, and both moments."""
    for number in range(first, last):
        step = bench.rows(number=number)
        for count, row in enumerate(step.rows, start=1):
            loss = engine.loss(row.to(engine.device))
            engine.backward(loss, step.supervised, last=count == len(step.rows))
        engine.step(RATE)
    return {
        f"{part} of {each.name}": value for each in engine.fragments() for part, value in each.values.items()
    }


def differing(found: Trained, expected: Trained) -> list[str]:
    """Names whose bits are not the same, or that only one of them has."""
    names = sorted({*found, *expected})
    return [
        name
        for name in names
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]


def restore(engine: Engine, folder: Path) -> None:
    """Continue from what `checkpoint.save` wrote."""
    _, saved = checkpoint.opened(folder, {})
    with closing(saved):
        engine.restore(saved)


@contextmanager
def one_order() -> Iterator[None]:
    """Kernels that add in one order: without, two runs of the same steps differ on a GPU.

    Attention's backward pass takes one order only where anything else is an error and no warning.
    """
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
