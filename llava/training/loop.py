"""One loop for both stages. What trains, on what, with which batch and rate is config.

The loss of a step is `sum(token losses) / (supervised tokens in the whole global batch)`, never a mean of
means, so that workers, rows and packing change where it is computed and nothing else.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed

from llava.data.collate import Collator
from llava.errors import LlavaError
from llava.training.engine import Engine
from llava.training.schedule import cosine_with_warmup


@dataclass(frozen=True)
class Schedule:
    """How many updates, and at which rate."""

    steps: int
    learning_rate: float
    """Peak, after the warm-up."""
    warmup_ratio: float


@dataclass
class StepReport:
    """What one step showed, equal on every rank."""

    step: int
    """Steps done after this one."""
    loss: float
    learning_rate: float
    grad_norm: float
    samples: int
    tokens: int
    supervised: int
    fill: float
    """Useful tokens over computed tokens on this rank."""
    seconds: float
    data_wait: float
    """Seconds that the step waited for its data."""


def train(
    engine: Engine,
    collator: Collator,
    schedule: Schedule,
    first: int,
    after_step: Callable[[StepReport], bool],
) -> int:
    """Run steps `first` to the end; returns the steps done.

    `after_step` returns True to stop early, on all ranks alike.
    """
    began = time.perf_counter()
    for done, step in enumerate(
        collator.steps(first, schedule.steps, engine.rank, engine.world), start=first + 1
    ):
        waited = time.perf_counter() - began
        rate = cosine_with_warmup(done - 1, schedule.steps, schedule.learning_rate, schedule.warmup_ratio)
        total = torch.zeros((), device=engine.device)
        for number, row in enumerate(step.rows, start=1):
            loss = engine.loss(row.to(engine.device))
            engine.backward(loss, step.supervised, last=number == len(step.rows))
            total += loss.detach()
        norm = engine.step(rate)
        if engine.world > 1:
            distributed.all_reduce(total)
        mean = float(total) / step.supervised
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise LlavaError(
                f"step {done}: the loss or its gradient is no number (loss {mean}, norm {norm}); samples on rank "
                f"{engine.rank}: {', '.join(step.ids[:16])}. Lower the learning rate or look at these samples"
            )
        now = time.perf_counter()
        report = StepReport(
            step=done,
            loss=mean,
            learning_rate=rate,
            grad_norm=norm,
            samples=step.samples,
            tokens=step.tokens,
            supervised=step.supervised,
            fill=step.useful / step.computed,
            seconds=now - began,
            data_wait=waited,
        )
        began = now
        if after_step(report):
            return done
    return schedule.steps
