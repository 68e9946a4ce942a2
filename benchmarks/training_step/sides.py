"""A side of the comparison, and ours.

All take the same global batch from the same weights with the same optimizer object; its rate is 0, so that the
weights stay what they were and every round can be compared, while AdamW does its whole arithmetic. Attention and
checkpointing are set by `enter`, which is not measured.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from benchmarks.training_step.shapes import World
from llava.attention import packing_attention
from llava.data.collate import Collator, Step
from llava.model import LlavaForTraining
from llava.training.engine import AdamW, PlainEngine

CLIP = 1e6
"""Gradient clipping is on, as it is by default in the Trainer, at a norm that no gradient reaches."""


class Side(Protocol):
    """One way to take a step."""

    name: str
    what: str
    """For the report."""

    def enter(self) -> None:
        """Prepare the shared model for this side; not measured."""
        ...

    def step(self, number: int) -> float:
        """Global batch `number`, from the data to the update; returns its loss."""
        ...

    def close(self) -> None:
        """End threads."""
        ...


class Ours:
    """Plan, assign, collate, `LlavaForTraining`, `PlainEngine`: what a worker's loop does in a step."""

    name = "ours"

    def __init__(
        self, world: World, engine: PlainEngine, collator: Collator, steps: int, checkpointing: bool
    ):
        self.world, self.engine, self.collator = world, engine, collator
        self.checkpointing = checkpointing
        self.what = f"packed rows of {collator.tokens_per_row} tokens" + saving(checkpointing)
        # On a GPU the next step's data is made while this one computes; on the CPU that would be counted elsewhere.
        self.ahead: Iterator[Step] | None = None
        if engine.device.type == "cuda":
            self.ahead = collator.steps(0, steps, 0, 1, device=engine.device)

    def enter(self) -> None:
        prepare(self.world, packing_attention("auto"), self.checkpointing)

    def step(self, number: int) -> float:
        step = next(self.ahead) if self.ahead else self.collator.step(number, 0, 1)
        total = torch.zeros((), device=self.engine.device)
        for count, row in enumerate(step.rows, start=1):
            loss = self.engine.loss(row.to(self.engine.device))
            self.engine.backward(loss, step.supervised, last=count == len(step.rows))
            total += loss.detach()
        self.engine.step(0.0)
        return float(total) / step.supervised

    def close(self) -> None:
        pass


def engine_of(world: World, adamw: AdamW) -> PlainEngine:
    """Our side's engine; its optimizer serves the other sides too."""
    return PlainEngine(LlavaForTraining(world.model, world.pixels), adamw, CLIP)


def collator_of(world: World) -> Collator:
    """Our side's collator."""
    return Collator(
        world.rows, world.stage.view, world.encoder, world.pixels, world.plan, world.batch.tokens_per_row
    )


def prepare(world: World, attention: str, checkpointing: bool) -> None:
    """Set the shared model's attention, and whether its layers are computed again."""
    world.model.model.language_model.set_attn_implementation(attention)
    # The names changed in transformers 5.
    change = "enable" if checkpointing else "disable"
    names = (f"activation_checkpointing_{change}", f"gradient_checkpointing_{change}")
    function = next(getattr(world.model, name) for name in names if hasattr(world.model, name))
    function(*([{"use_reentrant": False}] if checkpointing else []))


def saving(checkpointing: bool) -> str:
    """For the report."""
    return ", every layer checkpointed" if checkpointing else ", nothing checkpointed"
