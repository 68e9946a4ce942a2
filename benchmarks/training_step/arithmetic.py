"""What a step of a shape is made of, before anything runs: lengths, padding, operations, memory."""

import statistics
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.training_step.layout import BF16, FP32, expected_memory, work_of
from benchmarks.training_step.shapes import LONGEST, MEDIAN, SHORTEST, World
from llava.estimate import GIB
from llava.sizes import flops


def arithmetic_of(world: World, steps: int, bf16: bool, ours_saves: bool) -> dict[str, Any]:
    """What a mean step is made of, before anything runs."""
    index, batch, sizes = world.plan.index, world.batch, world.shape.sizes
    image = sizes.image_tokens
    padded, useful, rows, largest = [], [], 0, np.array([], dtype=np.int64)
    for number in range(steps):
        chosen = world.plan.samples(number)
        tokens = index.tokens[chosen]
        useful.append(int(tokens.sum()))
        padded.append(int(tokens.reshape(-1, batch.micro).max(axis=1).sum()) * batch.micro)
        placed = world.plan.place(number, 1, batch.tokens_per_row)[0]
        rows += len(placed)
        for row in placed:
            if tokens[row].sum() > index.tokens[largest].sum():
                largest = chosen[row]
    work = work_of(index.tokens, index.supervised, index.images)
    per_step = flops(sizes, type(work)(*(part / steps for part in work)), world.stage.training)
    text = np.sort(index.tokens - index.images * image)
    parts = {"vision": per_step.vision, "vocabulary": per_step.vocabulary, "attention": per_step.attention}
    expected = expected_memory(
        world.shape,
        world.stage,
        work_of(index.tokens[largest], index.supervised[largest], index.images[largest]),
        bf16,
        ours_saves,
    )
    return {
        "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        "learning": sum(p.numel() for p in world.model.parameters() if p.requires_grad),
        "text_tokens": {
            "min": int(text[0]),
            "median": int(np.median(text)),
            "mean": float(text.mean()),
            "p95": int(text[int(0.95 * len(text))]),
            "max": int(text[-1]),
        },
        "image_tokens": image,
        "supervised_share": float(index.supervised.sum() / index.tokens.sum()),
        "tokens_per_step": statistics.mean(useful),
        "padded_tokens_per_step": statistics.mean(padded),
        "rows_per_step": rows / steps,
        "flops_per_step": per_step.total,
        "flops_for_mfu": per_step.matrices,
        "shares": {part: value / per_step.total for part, value in parts.items()},
        "vocabulary_everywhere": per_step.vocabulary * work.tokens / work.supervised / per_step.total,
        "layout": BF16 if bf16 else FP32,
        "memory_gib": {part: value / GIB for part, value in asdict(expected).items()},
        "allocated_gib": expected.allocated / GIB,
    }


def told(found: dict[str, Any], world: World) -> list[str]:
    """The arithmetic in words."""
    text, shares, batch = found["text_tokens"], found["shares"], world.batch
    law = (
        "uniform in 10..25, and the newline"
        if world.stage.number == 1
        else f"log-normal around {MEDIAN} in {SHORTEST}..{LONGEST}"
    )
    return [
        f"{found['parameters']:,} parameters, {found['learning']:,} learn; {found['layout']}",
        f"text {text['min']}..{text['max']} tokens ({law}): median {text['median']}, mean {text['mean']:.0f}, "
        f"95 % under {text['p95']}; an image is {found['image_tokens']}; "
        f"{found['supervised_share']:.0%} of all tokens supervised",
        f"a step: {batch.samples} samples, {found['tokens_per_step']:,.0f} tokens in "
        f"{found['rows_per_step']:.1f} rows; "
        f"padded in batches of {batch.micro}: {found['padded_tokens_per_step']:,.0f} "
        f"({found['padded_tokens_per_step'] / found['tokens_per_step']:.2f}x)",
        f"{found['flops_per_step'] / 1e12:.3g} TFLOP a step, of which vision {shares['vision']:.1%}, attention "
        f"{shares['attention']:.1%}, vocabulary {shares['vocabulary']:.1%} at supervised positions (at all of them "
        f"{found['vocabulary_everywhere']:.1%})",
        f"memory expected at the peak: {found['allocated_gib']:.2f} GiB ("
        + ", ".join(f"{part} {value:.2f}" for part, value in found["memory_gib"].items() if value >= 0.005)
        + ")",
    ]
