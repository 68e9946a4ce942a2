"""DeepSpeed ZeRO 1, 2 and 3 on one device, against plain torch."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import distributed

from benchmarks.gpu.bench import PRECISIONS, Bench
from benchmarks.gpu.findings import Findings, LeftOut, apart
from benchmarks.gpu.resume import RATE, differing, one_order, restore, steps
from benchmarks.training_step.layout import MixedAdamW
from llava.training import checkpoint
from llava.training.engine import AdamW, Engine, PlainEngine

TOLERANCE = {torch.float32: (1e-5, 1e-4, 1e-2), torch.bfloat16: (2.0**-9, 2.0**-6, 0.5)}
"""Loss and gradient norm, relatively, and what all updates together differ by.

An update of Adam is about as large as its rate whatever the gradient: where a gradient is nearly nothing, rounding
decides its sign. In bf16, where DeepSpeed adds the rows up in fp32 and plain torch in bf16, that is a good part.
"""
STAGES = (1, 2, 3)
BUCKET = 8_000_000
"""Elements of DeepSpeed's buffer for gradients: more than any tensor has, fewer than all of them on a GPU."""


def check(bench: Bench, findings: Findings) -> None:
    """Two steps of each ZeRO stage and precision, then state, restore into another engine, and two more."""
    if find_spec("deepspeed") is None:
        raise LeftOut("deepspeed is not installed")
    try:
        from components.training.deepspeed_engine import prepare_environment
    except ImportError as missing:
        raise LeftOut(f"components/ is not here: {missing}") from None
    prepare_environment(bench.device.type)
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _group_of_one(bench), one_order():
        for dtype, precision in PRECISIONS.items():
            plain = PlainEngine(bench.module(dtype), MixedAdamW(), 1.0)
            expected = _run(bench, plain, dtype)
            for stage in STAGES:
                engine = _engine(bench, dtype, stage)
                found = _run(bench, engine, dtype)
                for what, error, allowed in zip(
                    ("loss", "norm", "updates"), _errors(found, expected), TOLERANCE[dtype], strict=True
                ):
                    findings.within(f"ZeRO-{stage}, {precision}: {what}", error, allowed)
                _restored(bench, findings, engine, dtype, stage, precision)
                del engine
                bench.release()
    findings.say(findings.worst())


Ran = tuple[list[float], list[float], dict[str, torch.Tensor]]


def _run(bench: Bench, engine: Engine, dtype: torch.dtype) -> Ran:
    """Losses, norms and what two steps added to each weight, in fp32."""
    before = {name: value.float().cpu() for name, value in bench.world().model.named_parameters()}
    losses, norms = [], []
    for number in range(2):
        step = bench.rows(number=number)
        total = 0.0
        for count, row in enumerate(step.rows, start=1):
            loss = engine.loss(row.to(engine.device))
            engine.backward(loss, step.supervised, last=count == len(step.rows))
            total += float(loss.detach())
        norms.append(engine.step(RATE))
        losses.append(total / step.supervised)
    if isinstance(engine, PlainEngine) and dtype != torch.float32:
        masters: Any = engine.optimizer
        weights = {name: value.detach().cpu() for name, value in masters.masters.items()}
    else:
        # In a group of one every parameter is in one piece.
        weights = {
            each.name: each.values["weights"].view(before[each.name].shape) for each in engine.fragments()
        }
    return losses, norms, {name: value - before[name] for name, value in weights.items()}


def _errors(found: Ran, expected: Ran) -> tuple[float, float, float]:
    pairs = [zip(found[part], expected[part], strict=True) for part in (0, 1)]
    loss, norm = (max(abs(one / other - 1) for one, other in pair) for pair in pairs)
    names = sorted(expected[2])
    if names != sorted(found[2]):
        return loss, norm, float("inf")
    ours, theirs = (torch.cat([each[2][name].flatten() for name in names]) for each in (found, expected))
    return loss, norm, apart(ours, theirs)


def _restored(
    bench: Bench, findings: Findings, engine: Engine, dtype: torch.dtype, stage: int, precision: str
) -> None:
    folder = bench.folder / f"saved-{stage}-{precision}"
    checkpoint.save(folder, engine, checkpoint.Position(2, {}, engine.updates))
    expected = steps(bench, engine, 2, 4)
    other = _engine(bench, dtype, stage)
    restore(other, folder)
    lost = differing(steps(bench, other, 2, 4), expected)
    findings.holds(
        f"ZeRO-{stage}, {precision}: the bits after a restore",
        not lost,
        f"{len(lost)} tensors differ: {lost[:3]}",
    )


def _engine(bench: Bench, dtype: torch.dtype, stage: int) -> Engine:
    from components.training.deepspeed_config import deepspeed_config
    from components.training.deepspeed_engine import DeepSpeedEngine

    # The default's buffers, 500 million elements each, take longer to make than the steps.
    small = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    config = deepspeed_config(stage, 1.0, bf16=dtype == torch.bfloat16, user=small)
    return DeepSpeedEngine(bench.module(dtype), AdamW(), config, bench.collator().blank_row())


@contextmanager
def _group_of_one(bench: Bench) -> Iterator[None]:
    """A process group of this process alone, and the variables that a launcher sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ[name] for name in told if name in os.environ}
    os.environ |= told
    distributed.init_process_group("nccl" if bench.cuda else "gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        for name in told:
            del os.environ[name]
        os.environ |= before
