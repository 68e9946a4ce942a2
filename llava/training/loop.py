"""One loop for both stages. What trains, on what, with which batch and rate is config.

The loss of a step is `sum(token losses) / (supervised tokens in the whole global batch)`, never a mean of
means, so that workers, rows and packing change where it is computed and nothing else.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from llava.data.collate import Collator
from llava.errors import LlavaError
from llava.training.engine import Engine
from llava.training.schedule import cosine_with_warmup

BITS = 4
"""Of a word that a rank says to the others."""


@dataclass(frozen=True)
class Schedule:
    """How many updates, and at which rate."""

    steps: int
    learning_rate: float
    """Peak, after the warm-up."""
    warmup_ratio: float
    seed: int = 0
    """Of dropout, where there is one."""
    warmup_from_zero: bool = False
    """See `cosine_with_warmup`."""

    def rate(self, update: int) -> float:
        """The learning rate of update number `update` (0 is the first)."""
        return cosine_with_warmup(
            update, self.steps, self.learning_rate, self.warmup_ratio, self.warmup_from_zero
        )


@dataclass
class StepReport:
    """What one step showed, equal on every rank but for `fill`, the times and `ids`."""

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
    ids: list[str]
    """This rank's samples."""
    word: int
    """What the ranks said to each other in this step: the bits that any of them said."""


def train(
    engine: Engine,
    collator: Collator,
    schedule: Schedule,
    first: int,
    after_step: Callable[[StepReport], bool],
    say: Callable[[], int] = lambda: 0,
) -> int:
    """Run steps `first` to the end; returns the steps done.

    `after_step` returns True to stop early, on all ranks alike. `say` is asked on every rank in every step: a word of
    up to `BITS` bits. How many ranks say each bit travels with the loss, so that a rank can tell the others something
    at no cost, and no two words that meet become a third.
    """
    began = time.perf_counter()
    for done, step in enumerate(
        collator.steps(first, schedule.steps, engine.rank, engine.world, device=engine.device),
        start=first + 1,
    ):
        waited = time.perf_counter() - began
        rate = schedule.rate(done - 1)
        seed_step(schedule.seed, done, engine.rank)
        total = torch.zeros(1 + BITS, dtype=torch.float64, device=engine.device)
        for number, row in enumerate(step.rows, start=1):
            loss = engine.loss(row.to(engine.device))
            engine.backward(loss, step.supervised, last=number == len(step.rows))
            total[0] += loss.detach()
        norm = engine.step(rate)
        said = say()
        total[1:] = torch.tensor([said >> bit & 1 for bit in range(BITS)])
        if engine.world > 1:
            distributed.all_reduce(total)
        loss_sum, *saying = total.tolist()
        mean = loss_sum / step.supervised
        if not (math.isfinite(mean) and math.isfinite(norm)):
            named = "; ".join(
                f"rank {rank}: {', '.join(ids)}" for rank, ids in enumerate(gathered(engine, step.ids))
            )
            raise LlavaError(
                f"step {done}: the loss or its gradient is no number (loss {mean}, norm {norm}); its samples: "
                f"{named}. Lower the learning rate or look at these samples"
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
            ids=step.ids,
            word=sum(1 << bit for bit, ranks in enumerate(saying) if ranks),
        )
        if after_step(report):
            return done
        # Looking at held-out samples and saving are no part of a step.
        began = time.perf_counter()
    return schedule.steps


def seed_step(seed: int, step: int, rank: int) -> None:
    """Torch's random state as a function of (seed, step, rank): no checkpoint has to hold it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def told(engine: Engine, value: Any) -> Any:
    """Rank 0's `value`, on every rank; all of them call it. Costs the logarithm of their number."""
    if engine.world == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=engine.device)
    return box[0]


def any_of(engine: Engine, true: bool) -> bool:
    """Whether it is true on any rank, on every rank, when all have come here."""
    if engine.world == 1:
        return true
    found = torch.tensor(float(true), device=engine.device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found.item())


def gathered(engine: Engine, value: Any) -> list[Any]:
    """`value` of every rank, on every rank; all of them call it.

    For what seldom happens: each rank gets something of each, padded to the longest.
    """
    if engine.world == 1:
        return [value]
    values: list[Any] = [None] * engine.world
    distributed.all_gather_object(values, value)
    return values
