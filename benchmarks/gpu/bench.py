"""What every step shares: the device, a small LLaVA and data for it, and gradients by our way and by the stock one.

The same weights serve everywhere. They are rounded to bf16 first, so that a model in fp32 and one in bf16 are the
same model, and the difference of their results is that of the arithmetic alone.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_step.peers import PaddingCollator, Samples
from benchmarks.training_step.shapes import STAGES, Batch, Shape, World, make_model, make_world
from benchmarks.training_step.sides import collator_of
from llava.conversation import IGNORE
from llava.data.collate import Collator, PackedRow, Step
from llava.miniature import randomise
from llava.model import LlavaForTraining, stock_attention
from llava.sizes import LanguageSizes, Sizes
from llava.towers.clip import ClipSizes

STEPS = 4
"""Global batches of data."""
SHAPES = {
    "short": Shape(
        Sizes(ClipSizes(32, 64, 3, 2, 32, 16), LanguageSizes(64, 160, 2, 4, 2, 16, 384)),
        {1: Batch(8, 4, 512), 2: Batch(4, 2, 1024)},
    ),
    "cpu": Shape(
        Sizes(ClipSizes(64, 128, 4, 2, 64, 16), LanguageSizes(128, 344, 4, 4, 2, 32, 1024)),
        {1: Batch(16, 8, 1024), 2: Batch(8, 4, 2048)},
    ),
    "gpu": Shape(
        Sizes(ClipSizes(256, 1024, 6, 4, 224, 14), LanguageSizes(512, 1408, 8, 8, 4, 64, 8192)),
        {1: Batch(32, 16, 8192), 2: Batch(16, 8, 8192)},
    ),
}
"""Grouped attention, heads and widths that every kernel takes; large enough on a GPU that memory shows."""
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Gradients:
    """One global batch, forward and backward."""

    loss: float
    """Mean over its supervised tokens."""
    hidden: dict[str, torch.Tensor]
    """Of each sample by id: (K, D), the states from which its K supervised tokens are predicted."""
    named: dict[str, torch.Tensor]
    """Of each parameter that learns."""
    peak_bytes: int | None
    """Allocated at the peak, above what was before; None without CUDA counters."""


@dataclass
class Bench:
    """The device, and what is made on it once for all steps."""

    device: torch.device
    short: bool
    seed: int
    folder: Path
    left: Callable[[], float] = lambda: float("inf")
    """Seconds of the budget."""
    reserved: float = 0.0
    """Seconds that steps still to come need."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What steps leave for later ones."""
    _worlds: dict[int, World] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the model that is compared; not those of the speed."""
        return SHAPES["gpu" if self.cuda else "short" if self.short else "cpu"]

    def world(self, stage: int = 2) -> World:
        """A stage's data and a model in fp32, whose weights are bf16 numbers and large enough that all parts matter."""
        if stage not in self._worlds:
            world = make_world(
                self.shape, stage, STEPS, self.seed, self.folder, self.device, torch.float32
            )  # fmt: skip
            torch.manual_seed(self.seed)
            randomise(world.model)
            with torch.no_grad():
                for parameter in world.model.parameters():
                    parameter.copy_(parameter.to(torch.bfloat16))
            self._worlds[stage] = world
        return self._worlds[stage]

    def module(self, dtype: torch.dtype, stage: int = 2, attention: str = "auto") -> LlavaForTraining:
        """A model of its own with the weights of `world`."""
        world = self.world(stage)
        model = make_model(
            world.shape.sizes, world.encoder.tokenizer, STAGES[stage], self.seed, self.device, dtype
        )
        model.load_state_dict(world.model.state_dict())
        return LlavaForTraining(model, world.pixels, attention)

    def collator(self, tokens_per_row: int | None = None, stage: int = 2) -> Collator:
        """Of `world`'s data; a budget of 1 gives each sample a row of its own."""
        made = collator_of(self.world(stage))
        made.tokens_per_row = tokens_per_row or made.tokens_per_row
        return made

    def rows(self, tokens_per_row: int | None = None, stage: int = 2, number: int = 0) -> Step:
        """A global batch as rows."""
        return self.collator(tokens_per_row, stage).step(number, 0, 1)

    def gradients(
        self, module: LlavaForTraining, step: Step, forward: Callable[[PackedRow], torch.Tensor] | None = None
    ) -> Gradients:
        """Our way: what `module` gives for the rows of `step`."""
        seen: list[torch.Tensor] = []
        inner = module.loss

        def loss(hidden_KD: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
            seen.append(hidden_KD.detach())
            return inner(hidden_KD, targets_K)

        module.zero_grad()
        module.loss = loss  # type: ignore[method-assign]
        total = 0.0
        rows = [row.to(self.device) for row in step.rows]
        try:
            with self.peak() as peak:
                for row in rows:
                    found = (forward or module)(row) / step.supervised
                    found.backward()
                    total += float(found.detach())
        finally:
            module.loss = inner  # type: ignore[method-assign]
        hidden = dict(_by_sample(step, seen))
        return Gradients(total, hidden, _grads(module), peak[0] if peak else None)

    def stock_gradients(self, module: LlavaForTraining, number: int = 0, stage: int = 2) -> Gradients:
        """The stock way: each sample of global batch `number` alone through stock LLaVA with its labels."""
        world, model = self.world(stage), module.stock
        samples, index = Samples(world, number + 1, sort=False), world.plan.index
        chosen = world.plan.samples(number)
        supervised = int(index.supervised[chosen].sum())
        collate = PaddingCollator(world.image_processor, world.encoder.tokenizer.pad_token_id)
        hidden, total = {}, 0.0
        seen: list[torch.Tensor] = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        module.zero_grad()
        try:
            with stock_attention(model), self.peak() as peak:
                for place, sample in enumerate(chosen, start=len(samples) - len(chosen)):
                    batch = {name: value.to(self.device) for name, value in collate([samples[place]]).items()}
                    loss = model(**batch, num_items_in_batch=supervised, use_cache=False).loss
                    loss.backward()
                    total += float(loss.detach())
                    row = world.rows.row(int(index.group[sample]), int(index.row[sample]))
                    told = batch["labels"][0, 1:] != IGNORE
                    hidden[row["id"]] = seen.pop()[0, :-1][told].float()
        finally:
            hook.remove()
        return Gradients(total, hidden, _grads(module), peak[0] if peak else None)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Gives a list that afterwards holds the bytes allocated at the peak above those before; empty on a CPU."""
        found: list[int] = []
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield found
        if self.cuda:
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated() - before)

    def forget(self) -> None:
        """Let go of all that was made once; it is made again when it is asked for."""
        self.kept.clear()
        self._worlds.clear()
        self.release()

    def synchronise(self) -> None:
        """Wait until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory that nobody holds back to the card."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def _by_sample(step: Step, hidden: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    ids = iter(step.ids)
    for row, found in zip(step.rows, hidden, strict=True):
        ends = torch.tensor(row.segments.lengths).cumsum(0)
        number = torch.bucketize(row.predict, ends, right=True).to(found.device)
        for sample in range(len(row.segments.lengths)):
            yield next(ids), found[number == sample].float()


def _grads(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[name.removeprefix("stock.")] = parameter.grad.detach().float()
    module.zero_grad()
    return found
