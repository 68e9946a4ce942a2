"""One training step against what a user would otherwise run.

Ours (packed rows, attention inside samples, logits where there is a label) and Hugging Face's `Trainer` with a padding
collator on the stock LLaVA, interleaved: the same weights, data, global batches and optimizer. Each round
takes one global batch on every side, in turns that rotate, from the picture's bytes and the tokens to the update. On
the CPU the process's CPU time on one core is counted, on a GPU the time on the wall. Losses are compared in
every round, gradients of the whole global batch in those that are not timed.

`--dry-run` makes the data and prints the arithmetic: lengths, padding, where the operations are, memory.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers

from benchmarks.training_step import peers, sides
from benchmarks.training_step.arithmetic import arithmetic_of, told
from benchmarks.training_step.layout import MixedAdamW
from benchmarks.training_step.shapes import SHAPES, STAGES, World, make_world, shape_of
from llava import estimate
from llava.training.engine import PlainEngine

WARM = 2
"""Rounds before the timed ones; their gradients are compared."""
LOSS, GRADIENT = 1e-5, 1e-4
"""What losses and gradients may differ by, relatively, in fp32."""
TARGETS = {("tiny", 1): 1.3, ("tiny", 2): 2.0, ("7b-like", 2): 1.3, ("7b", 1): 1.5, ("7b", 2): 1.5}
PACKAGES = ("torch", "transformers", "accelerate", "trl")


@dataclass
class Measured:
    """One side over the timed rounds."""

    name: str
    what: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loss: float = 0.0
    """Largest relative difference from our loss, over all rounds."""
    gradient: float = 0.0
    """Largest relative difference of a parameter's gradient from ours, ||a - b|| / ||a||."""
    where: str = ""
    """That parameter."""


def main() -> None:
    """The command line."""
    options = parsed()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(options.device)
    torch.set_num_threads(1 if device.type == "cpu" else os.cpu_count() or 1)
    if device.type == "cpu":
        # Where DeepSpeed is installed, accelerate asks it, and it would say in the output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if device.type == "cuda" and not options.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device is here; `--device cuda --dry-run` prints the arithmetic")
    report: dict[str, Any] = {
        "command": " ".join(["benchmarks/train_step.py", *sys.argv[1:]]),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name()
        if device.type == "cuda" and not options.dry_run
        else options.device,
        "seed": options.seed,
        "results": [],
    }
    say = (lambda line: None) if options.json else print
    for name in options.shape:
        for stage in options.stage:
            with tempfile.TemporaryDirectory() as folder:
                report["results"].append(compare(options, name, stage, device, Path(folder), say))
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(", ".join(f"{name} {found}" for name, found in report["versions"].items()))
    if wrong := [result for result in report["results"] if result.get("agree") is False]:
        sys.exit(
            f"{len(wrong)} comparisons differ by more than {LOSS:g} in the loss or {GRADIENT:g} in a gradient"
        )


def compare(
    options: argparse.Namespace, name: str, stage: int, device: torch.device, folder: Path, say: Any
) -> dict[str, Any]:
    """One shape and stage: the arithmetic, then the rounds; returns what `--json` prints."""
    bf16, cuda = options.precision == "bf16", device.type == "cuda"
    steps = WARM + options.rounds
    made_on = torch.device("meta") if options.dry_run else device
    world = make_world(
        shape_of(name, options.vocabulary),
        stage,
        steps,
        options.seed,
        folder,
        made_on,
        torch.bfloat16 if bf16 else torch.float32,
    )
    # Stage 1 keeps everything on a card of 80 GB and more; all of 7B with its optimizer leaves no room for it.
    ours_saves = name == "7b" and stage == 2
    arithmetic = arithmetic_of(world, steps, bf16, ours_saves)
    say(f"{name}, stage {stage}: {len(world.plan.index)} samples, seed {options.seed}")
    for line in told(arithmetic, world):
        say(f"  {line}")
    result = {"shape": name, "stage": stage, "rounds": options.rounds, "arithmetic": arithmetic}
    if options.dry_run:
        return result
    measured, unit = measure(world, options, ours_saves, folder)
    ours, *others = measured
    result["sides"] = [asdict(side) for side in measured]
    result["ratios"] = {side.name: spread(side, ours) for side in others}
    result["target"] = TARGETS.get((name, stage))
    result["agree"] = (
        all(side.loss <= LOSS and side.gradient <= GRADIENT for side in others) if not bf16 else None
    )
    for side in measured:
        say(f"  {side.name}: {side.what}; {statistics.median(side.seconds):.3f} s {unit}")
    for side in others:
        ratio = result["ratios"][side.name]
        say(
            f"  {side.name} / ours: {ratio['median']:.2f}x (min {ratio['min']:.2f}, max {ratio['max']:.2f}, "
            f"{options.rounds} rounds); loss differs by {side.loss:.1e}, "
            f"gradients by {side.gradient:.1e} ({side.where})"
        )
    if cuda:
        result["gpu"] = on_gpu(arithmetic, measured, options.gpu)
        for line in result["gpu"]["lines"]:
            say(f"  {line}")
    return result


def measure(
    world: World, options: argparse.Namespace, ours_saves: bool, folder: Path
) -> tuple[list[Measured], str]:
    """All sides over the same global batches, in turns; gradients are compared in the rounds before the timed ones."""
    steps = WARM + options.rounds
    adamw = MixedAdamW()
    engine = sides.engine_of(world, adamw)
    cuda = engine.device.type == "cuda"
    contenders = entrants(world, engine, adamw, steps, ours_saves, folder)
    measured = [Measured(side.name, side.what) for side in contenders]
    for number in range(steps):
        timed, losses, gradients = number >= WARM, {}, {}
        for turn in np.roll(np.arange(len(contenders)), number).tolist():
            side, found = contenders[turn], measured[turn]
            side.enter()
            watch = Watch(side, engine, keep=not timed)
            losses[turn], seconds, peak = one_step(side, number, cuda)
            gradients[turn] = watch.stop()
            if timed:
                found.seconds.append(seconds)
                found.peak_bytes = max(found.peak_bytes, peak)
        for turn, found in enumerate(measured[1:], start=1):
            found.loss = max(found.loss, abs(losses[turn] / losses[0] - 1))
            for name, mine in gradients[0].items():
                apart = float((gradients[turn][name].float() - mine.float()).norm() / mine.float().norm())
                if apart >= found.gradient:
                    found.gradient, found.where = apart, name
    for side in contenders:
        side.close()
    return measured, "a step" if cuda else "of CPU time a step"


def entrants(
    world: World, engine: PlainEngine, adamw: MixedAdamW, steps: int, ours_saves: bool, folder: Path
) -> list[sides.Side]:
    """Ours, what it is compared with, and further lines for information."""
    padding = peers.peer()
    ours = sides.Ours(world, engine, sides.collator_of(world), steps, ours_saves)
    if engine.device.type == "cuda":
        # With checkpointing, as LLaVA's own scripts have it; where there is memory, also without.
        saving = padding("hf", world, engine.optimizer, steps, folder, checkpointing=True)
        others = [] if ours_saves else [padding("hf, nothing saved", world, engine.optimizer, steps, folder)]
        return [ours, saving, *others]
    found: list[sides.Side] = [
        ours,
        padding("hf", world, engine.optimizer, steps, folder),
        padding("hf grouped by length", world, engine.optimizer, steps, folder, sort=True),
    ]
    return [*found, peers.TrlSide("trl", world, adamw, steps, folder)] if find_spec("trl") else found


def one_step(side: sides.Side, number: int, cuda: bool) -> tuple[float, float, int]:
    """Loss, seconds (on the wall with a GPU, of CPU time without) and the GPU's peak of memory in bytes."""
    if not cuda:
        began = time.process_time()
        return side.step(number), time.process_time() - began, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = side.step(number)
    torch.cuda.synchronize()
    return loss, time.perf_counter() - began, torch.cuda.max_memory_allocated()


class Watch:
    """Keeps the gradients of the whole global batch, as the optimizer is about to use them."""

    def __init__(self, side: sides.Side, engine: PlainEngine, keep: bool):
        self.gradients: dict[str, torch.Tensor] = {}
        self.named = getattr(side, "named", engine.named)
        optimizer = getattr(side, "optimizer", engine.optimizer)
        self.hook = optimizer.register_step_pre_hook(self._copy) if keep else None

    def _copy(self, *_: Any) -> None:
        self.gradients = {
            name: parameter.grad.detach().cpu().clone() for name, parameter in self.named.items()
        }

    def stop(self) -> dict[str, torch.Tensor]:
        """The gradients by parameter; empty in a timed round."""
        if self.hook:
            self.hook.remove()
        return self.gradients


def spread(side: Measured, ours: Measured) -> dict[str, float]:
    """How many times longer `side` takes, over the rounds."""
    ratios = [theirs / mine for theirs, mine in zip(side.seconds, ours.seconds, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def on_gpu(arithmetic: dict[str, Any], measured: list[Measured], card: str) -> dict[str, Any]:
    """MFU of each side over useful tokens, and our peak of memory against the estimate."""
    peak = estimate.gpu(card).tflops * 1e12
    lines, found = [], {}
    for side in measured:
        mfu = arithmetic["flops_for_mfu"] / statistics.median(side.seconds) / peak
        gib = side.peak_bytes / estimate.GIB
        found[side.name] = {"mfu": mfu, "peak_gib": gib}
        lines.append(
            f"{side.name}: MFU {mfu:.1%} of {card}'s {peak / 1e12:.0f} TFLOP/s, {gib:.1f} GiB at the peak"
        )
    off = measured[0].peak_bytes / estimate.GIB / arithmetic["allocated_gib"] - 1
    lines.append(f"our peak is {off:+.1%} from the {arithmetic['allocated_gib']:.1f} GiB that were expected")
    return {"sides": found, "peak_against_estimate": off, "lines": lines}


def parsed() -> argparse.Namespace:
    """Options; `--shape` and `--stage` come as lists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", choices=["1", "2", "all"], default="all", help="which stage to compare")
    parser.add_argument("--shape", choices=[*SHAPES, "cpu"], help="model's sizes; 'cpu' is tiny and 7b-like")
    parser.add_argument("--rounds", type=int, default=9, help="timed global batches")
    parser.add_argument("--vocabulary", type=int, help="another number of tokens than the shape's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="fp32 on the CPU, bf16 on CUDA if not given"
    )
    parser.add_argument(
        "--gpu", choices=list(estimate.GPUS), default="h200-141g", help="whose peak MFU is a share of"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, texts and order")
    parser.add_argument("--json", action="store_true", help="print ratios, differences and rounds as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the arithmetic, run nothing")
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    wanted = options.shape or ("7b" if options.device == "cuda" else "cpu")
    options.shape = ["tiny", "7b-like"] if wanted == "cpu" else [wanted]
    options.stage = list(STAGES) if options.stage == "all" else [int(options.stage)]
    return options


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
