"""What travels to the device: pixels as uint8 against the stock processor's, and rows from pinned memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.findings import EPSILON, Findings
from llava.data.collate import PackedRow
from llava.generate import pixel_values

PIXELS = 1e-6
"""What a normalised value of up to about 2.6 may differ by in fp32: four units in its last place."""
TIMES = 15
EDGE = 4096
"""Of the matrices whose products keep a GPU busy while rows are copied."""


def pixels(bench: Bench, findings: Findings) -> None:
    """Resized on the CPU to uint8 and normalised on the device, against the stock image processor."""
    world = bench.world()
    random = np.random.default_rng(bench.seed)
    for width, height in ((640, 480), (90, 200), (33, 7)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        stock = pixel_values(world, image)
        assert stock is not None
        ours = torch.from_numpy(world.pixels(image))[None].to(bench.device)
        whole = world.pixels.normalise(ours, torch.float32)[0].cpu()
        findings.within(f"{width} x {height}, fp32", float((whole - stock).abs().max()), PIXELS)
        half = world.pixels.normalise(ours, torch.bfloat16)[0].cpu()
        off = (half.double() - stock.double()).abs() / stock.double().abs().clamp_min(1e-2)
        findings.within(f"{width} x {height}, bf16", float(off.max()), 1.01 * EPSILON[torch.bfloat16])
    findings.say(findings.worst())


def rows(bench: Bench, findings: Findings) -> None:
    """Rows through `Collator.steps` for this device, equal to those of the CPU; and how long their copies take."""
    collator = bench.collator()
    expected = [row for number in range(2) for row in collator.step(number, 0, 1).rows]
    device = next(bench.world().model.parameters()).device
    made = [row for step in collator.steps(0, 2, 0, 1, device=device) for row in step.rows]
    for number, (row, plain) in enumerate(zip(made, expected, strict=True)):
        moved = row.to(bench.device)
        for name, value in vars(plain).items():
            if isinstance(value, torch.Tensor):
                same = torch.equal(getattr(moved, name).cpu(), value)
                findings.holds(f"row {number}: {name} arrives whole", same, "other values arrive")
        same = torch.equal(moved.segments.on(bench.device).cpu(), plain.segments.bounds)
        findings.holds(f"row {number}: bounds arrive whole", same, "other values arrive")
    size = sum(value.nbytes for value in vars(expected[0]).values() if isinstance(value, torch.Tensor))
    if bench.cuda:
        pinned = all(value.is_pinned() for row in made for value in _tensors(row))
        findings.holds("rows for a GPU are pinned", pinned, "some are pageable")
        _let_go(bench, findings, expected)
    else:
        findings.without("pinned memory", "it needs CUDA; a row on the CPU is not copied")
    # As a copy is made by default: it returns when it is done.
    times = {"pageable": _timed(bench, partial(_waiting, expected[0]))}
    if bench.cuda:
        times["pinned"] = _timed(bench, made[0].to)
    findings.figures |= {"row_bytes": size, "seconds": times}
    told = [f"{kind} {each['alone'] * 1e6:.0f} us" for kind, each in times.items()]
    findings.say(f"a row of {size:,} bytes: {', '.join(told)}")
    for kind, each in times.items():
        if "behind_work" in each:
            findings.say(f"{kind} holds up the caller for {each['behind_work'] * 1e6:.0f} us behind kernels")


def _waiting(row: PackedRow, device: torch.device) -> PackedRow:
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(row).items() if isinstance(value, torch.Tensor)
    }
    return replace(row, **moved)


def _tensors(row: PackedRow) -> Iterator[torch.Tensor]:
    yield row.segments.bounds
    yield from (value for value in vars(row).values() if isinstance(value, torch.Tensor))


def _let_go(bench: Bench, findings: Findings, expected: list[PackedRow]) -> None:
    """Nobody holds the pinned rows while they are copied behind long kernels, and new ones ask for their memory."""
    work = torch.randn(EDGE, EDGE, device=bench.device)
    moved, given = [], []
    for number in range(8):
        for _ in range(4):
            work = (work @ work).clamp(-1, 1)
        # Other values each time, of the same size: what is written over shows.
        given += [
            replace(row, input_ids=row.input_ids + number, pixels=row.pixels ^ number) for row in expected
        ]
        moved += [row.pinned().to(bench.device) for row in given[-len(expected) :]]
    whole = all(
        torch.equal(getattr(found, name).cpu(), getattr(row, name))
        for found, row in zip(moved, given, strict=True)
        for name in ("input_ids", "pixels")
    )
    findings.holds("rows whose pinned memory was let go arrive whole", whole, "memory was written over")


def _timed(bench: Bench, copy: Callable[[torch.device], PackedRow]) -> dict[str, float]:
    """Median seconds of a row's copy with nothing before it, and, on a GPU, of its call behind kernels."""
    alone, behind = [], []
    work = torch.ones(EDGE, EDGE, device=bench.device) if bench.cuda else None
    for _ in range(TIMES):
        bench.synchronise()
        began = time.perf_counter()
        held = copy(bench.device)
        bench.synchronise()
        alone.append(time.perf_counter() - began)
        if work is not None:
            for _ in range(5):
                work = work @ work * 0
            began = time.perf_counter()
            held = copy(bench.device)
            behind.append(time.perf_counter() - began)
        del held
    found = {"alone": statistics.median(alone)}
    return found | ({"behind_work": statistics.median(behind)} if behind else {})
