"""One training step of LLaVA-1.5-7B's shape, as much of it as the card holds, against the Trainer with padding."""

import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.findings import MEAN, Findings, LeftOut
from benchmarks.gpu.variants import NO_COUNTERS
from benchmarks.train_step import LOSS, Measured, one_step, spread
from benchmarks.training_step import peers, sides
from benchmarks.training_step.arithmetic import arithmetic_of
from benchmarks.training_step.layout import MixedAdamW, expected_memory
from benchmarks.training_step.shapes import LONGEST, SHAPES, STAGES, Shape, Stage, make_world
from llava import estimate
from llava.estimate import GIB, GPUS, RESERVE, Gpu
from llava.sizes import Flops, Work

ROUNDS = {"cuda": 9, "cpu": 3, "short": 2}
"""Timed rounds at most."""
BUDGETS = {1: (12288, 8192, 4096), 2: (16384, 8192, 4096)}
"""Tokens per row that a choice tries, by stage."""
CARDS = {
    "A100": ("a100-40g", "a100-80g"),
    "H100": ("h100-80g",),
    "H200": ("h200-141g",),
    "L40S": ("l40s-48g",),
    "L4": ("l4-24g",),
    "RTX 4090": ("rtx4090-24g",),
}
"""Words of a device's name -> cards whose data sheet `llava.estimate` has, the smaller first."""
OTHERS = ("PCIe", "NVL")
"""Boards of the same name with another peak."""


@dataclass(frozen=True)
class Fitted:
    """What runs on a card."""

    shape: Shape
    checkpointing: bool
    """Ours. The padding side checkpoints every layer, as LLaVA's own scripts do."""
    theirs_whole: bool
    """Whether the padding side fits with nothing checkpointed, too: then it runs both ways."""
    expected_gib: float
    usable_gib: float


def check(bench: Bench, findings: Findings) -> None:
    """Both stages in the time that is left: the ratio of medians, MFU and memory against the estimate."""
    bench.forget()
    card = card_of(torch.cuda.get_device_name(), _total(bench)) if bench.cuda else None
    for stage in (1, 2):
        end = bench.left() - (bench.left() - bench.reserved) / (3 - stage)
        chosen = _chosen(bench, stage, card)
        try:
            found = _measured(bench, findings, stage, chosen, end, card)
        except torch.cuda.OutOfMemoryError as error:
            findings.faults.append(f"{told(chosen)}: {str(error).splitlines()[0]}")
            found = None
        if found is None:
            # Smaller, once more: a figure of the speed is worth having.
            bench.release()
            found = _measured(bench, findings, stage, smaller(chosen), end, card)
        findings.figures[f"stage {stage}"] = found
        bench.release()
    if not bench.cuda:
        findings.figures["fitted"] = {
            f"{name}, stage {stage}": told(fitted(GPUS[name], stage))
            for name in ("h100-80g", "h200-141g")
            for stage in (1, 2)
        }
        findings.without("MFU", "a CPU has no peak to compare with; the shape is the tiny one")
        findings.without("peak memory", NO_COUNTERS)


def card_of(name: str, total: int) -> Gpu | None:
    """The data sheet of a device by its name and bytes; None where there is none."""
    if any(other in name for other in OTHERS):
        return None
    for words, cards in CARDS.items():
        if words in name:
            fitting = [GPUS[card] for card in cards if GPUS[card].memory_gib * GIB * 0.9 < total]
            return fitting[-1] if fitting else GPUS[cards[0]]
    return None


def fitted(card: Gpu, stage: int, free: float | None = None) -> Fitted:
    """The most layers of 7B that `card` holds on both sides; then the longest rows, then nothing checkpointed.

    `free`: bytes that are free now. Raises `LeftOut` where not even one layer fits.
    """
    usable = min(estimate.usable(card), free or float("inf"))
    room = usable * (1 - RESERVE.margin)
    whole, kind = SHAPES["7b"], STAGES[stage]
    for layers in range(whole.sizes.language.layers, 0, -1):
        language = replace(whole.sizes.language, layers=layers)
        for tokens in BUDGETS[stage]:
            batch = replace(whole.batches[stage], tokens_per_row=tokens)
            shape = Shape(replace(whole.sizes, language=language), {stage: batch})
            theirs = expected_memory(shape, kind, _padded(shape, kind), True, checkpointing=True)
            for saves in (False, True):
                ours = expected_memory(shape, kind, _row(shape, kind, tokens), True, saves)
                if max(ours.total, theirs.total) <= room:
                    kept = expected_memory(shape, kind, _padded(shape, kind), True, checkpointing=False)
                    return Fitted(shape, saves, kept.total <= room, ours.allocated / GIB, usable / GIB)
    raise LeftOut(f"not one layer of 7B fits into {usable / GIB:.1f} GiB")


def smaller(found: Fitted) -> Fitted:
    """The same with three quarters of the layers."""
    sizes = found.shape.sizes
    language = replace(sizes.language, layers=max(1, sizes.language.layers * 3 // 4))
    return replace(found, shape=replace(found.shape, sizes=replace(sizes, language=language)))


def told(found: Fitted) -> str:
    """For people."""
    ((stage, batch),) = found.shape.batches.items()
    layers, whole = found.shape.sizes.language.layers, SHAPES["7b"].sizes.language.layers
    size = (
        "all of 7B"
        if layers == whole
        else f"{layers} of 7B's {whole} layers, since all of them do not fit into {found.usable_gib:.0f} GiB"
    )
    saves = "every layer" if found.checkpointing else "nothing"
    return f"stage {stage}: {size}; rows of {batch.tokens_per_row}, {saves} checkpointed"


def _row(shape: Shape, stage: Stage, tokens: int) -> Work:
    """Our row at its heaviest: full, of samples of mean length, supervised wherever there is text."""
    image, text = shape.sizes.image_tokens, 20 if stage.number == 1 else 180
    count = tokens / (image + text)
    return Work(tokens, tokens * (image + text) * 1.2, count * text, count)


def _padded(shape: Shape, stage: Stage) -> Work:
    """A padded batch at its largest; the stock model has logits everywhere."""
    longest = shape.sizes.image_tokens + (26 if stage.number == 1 else LONGEST)
    (batch,) = shape.batches.values()
    return Work.of([longest] * batch.micro, longest * batch.micro, batch.micro)


def _measured(
    bench: Bench, findings: Findings, stage: int, chosen: Fitted, end: float, card: Gpu | None
) -> dict[str, Any]:
    """One stage; rounds end where less than `end` seconds of the budget are left."""
    bf16 = bench.cuda
    steps = 1 + ROUNDS["cuda" if bench.cuda else "short" if bench.short else "cpu"]
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        world = make_world(
            chosen.shape,
            stage,
            steps,
            bench.seed,
            folder,
            bench.device,
            torch.bfloat16 if bf16 else torch.float32,
        )
        arithmetic = arithmetic_of(world, steps, bf16, chosen.checkpointing)
        engine = sides.engine_of(world, MixedAdamW())
        ours = sides.Ours(world, engine, sides.collator_of(world), steps, chosen.checkpointing)
        padding = peers.peer()
        entered: list[sides.Side] = [
            ours,
            padding("hf", world, engine.optimizer, steps, folder, checkpointing=bench.cuda),
        ]
        if chosen.theirs_whole:
            entered.append(padding("hf, nothing saved", world, engine.optimizer, steps, folder))
        measured = [Measured(side.name, side.what) for side in entered]
        try:
            for number in range(steps):
                before = bench.left()
                _round(bench, entered, measured, number)
                # The next one takes as long; the first has warmed up and counts for nothing.
                if number and 2 * bench.left() - before < end:
                    break
        finally:
            for entrant in entered:
                entrant.close()
    mine, *others = measured
    found: dict[str, Any] = {
        "shape": told(chosen) if bench.cuda else "tiny",
        "sizes": asdict(chosen.shape.sizes),
        "arithmetic": arithmetic,
        "sides": [asdict(side) for side in measured],
        "ratios": {side.name: spread(side, mine) for side in others},
    }
    unit = "on the wall" if bench.cuda else "of CPU time"
    rounds = len(mine.seconds)
    findings.say(
        f"stage {stage}: ours {statistics.median(mine.seconds):.3f} s a step {unit}, median of {rounds}"
    )
    for side in others:
        findings.within(f"stage {stage}: loss of {side.name}", side.loss, 2 * MEAN if bf16 else LOSS)
        ratio = found["ratios"][side.name]
        findings.say(
            f"{side.what.split(',')[0]} ({side.what.rpartition(', ')[2]}) {ratio['median']:.2f}x that "
            f"({ratio['min']:.2f}..{ratio['max']:.2f})"
        )
    if bench.cuda:
        found["gpu"] = _on_gpu(findings, arithmetic, measured, card, stage)
        findings.say(found["shape"])
    return found


def _round(bench: Bench, entered: list[Any], measured: list[Measured], number: int) -> None:
    """One global batch on both sides, in turns; the first one warms up."""
    losses = {}
    for turn in np.roll(np.arange(len(entered)), number).tolist():
        entered[turn].enter()
        losses[turn], seconds, peak = one_step(entered[turn], number, bench.cuda)
        if number:
            measured[turn].seconds.append(seconds)
        measured[turn].peak_bytes = max(measured[turn].peak_bytes, peak)
    for turn, found in enumerate(measured[1:], start=1):
        found.loss = max(found.loss, abs(losses[turn] / losses[0] - 1))


def _chosen(bench: Bench, stage: int, card: Gpu | None) -> Fitted:
    if not bench.cuda:
        shape = bench.shape if bench.short else SHAPES["tiny"]
        return Fitted(shape, False, False, 0, 0)
    free, _ = torch.cuda.mem_get_info()
    # A card without a data sheet has its memory all the same.
    return fitted(card or Gpu(round(_total(bench) / GIB), 0, 0), stage, free)


def _on_gpu(
    findings: Findings, arithmetic: dict[str, Any], measured: list[Measured], card: Gpu | None, stage: int
) -> dict[str, Any]:
    """MFU over useful tokens, and our peak of memory against the estimate."""
    found: dict[str, Any] = {}
    if card is None:
        findings.without("MFU", f"no data sheet of {torch.cuda.get_device_name()} is known")
    for side in measured:
        each = found[side.name] = {"peak_gib": side.peak_bytes / GIB}
        if card is not None:
            done = Flops(arithmetic["flops_for_mfu"], 0, 0, 0, 0)
            each["mfu"] = estimate.mfu(done, statistics.median(side.seconds), card)
            findings.holds(f"stage {stage}, {side.name}: MFU", 0 < each["mfu"] < 1, f"{each['mfu']}")
            findings.say(f"{side.name}: MFU {each['mfu']:.1%}, {each['peak_gib']:.1f} GiB")
    found["peak_over_estimate"] = found["ours"]["peak_gib"] / arithmetic["allocated_gib"]
    findings.say(f"our peak is {found['peak_over_estimate']:.2f} of the estimate")
    return found


def _total(bench: Bench) -> int:
    return int(torch.cuda.get_device_properties(bench.device).total_memory)
