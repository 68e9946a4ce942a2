"""One check of everything that needs a GPU, right results before speed, on a machine with nothing but `llava/`.

`python -m benchmarks.gpu_check --minutes 8 --out gpu_check.json`. Each step prints a line as it ends (ok, FAILED or
left out, why, seconds); the file is written after each. A step that fails does not end the run; the status is 1 if
one did. Where there is no GPU, or with `--device cpu`, the same steps run with small shapes on the CPU.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # cuBLAS reads it once: without, two runs of the same steps may differ. On Hopper it is the default's size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # One GPU, however many are here: the Trainer would spread its batches over all of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from benchmarks.gpu import (
    attention,
    copies,
    generation,
    here,
    optimizer,
    packing,
    resume,
    speed,
    variants,
    zero,
)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.findings import Findings, LeftOut, OutOfTime

OK, FAILED, LEFT_OUT, RUNNING = "ok", "FAILED", "left out", "running"


@dataclass(frozen=True)
class Step:
    """One line of the report."""

    name: str
    what: str
    run: Callable[[Bench, Findings], None]
    seconds: tuple[float, float, float]
    """What it takes with `--short`, on the CPU, and on a GPU: it is left out where less of the budget is left."""


STEPS = (
    Step("here", "device, versions, kernels that run", here.check, (2, 4, 20)),
    Step("attention", "each kernel against fp64, sample by sample", attention.check, (2, 4, 10)),
    Step("packing", "packed rows against stock LLaVA alone", packing.check, (4, 15, 20)),
    Step("fused-loss", "in chunks against whole", variants.fused_loss, (2, 6, 10)),
    Step("compile", "compiled layers against plain ones", variants.compiled, (4, 60, 90)),
    Step("checkpointing", "selective and full against none", variants.checkpointing, (2, 8, 10)),
    Step("lora", "adapters that learn and merge", variants.with_lora, (2, 8, 10)),
    Step("resume", "the bits after save and restore", resume.check, (4, 15, 20)),
    Step("optimizer", "fused AdamW against unfused", optimizer.check, (1, 1, 3)),
    Step("pixels", "uint8 on the device against the stock processor", copies.pixels, (1, 1, 3)),
    Step("copies", "rows to the device, pinned and pageable", copies.rows, (1, 2, 5)),
    Step("generation", "tokens against stock generate", generation.check, (3, 6, 15)),
    Step("speed", "a step of 7B's shape against the Trainer", speed.check, (5, 30, 90)),
)
DEEPSPEED = Step("deepspeed", "ZeRO 1, 2 and 3 against plain torch", zero.check, (15, 40, 60))


@dataclass
class Result:
    """What one step came to."""

    name: str
    state: str = RUNNING
    why: str = ""
    seconds: float = 0.0
    findings: Findings = field(default_factory=Findings)

    @property
    def line(self) -> str:
        """For the terminal."""
        told = self.why or "; ".join(self.findings.said)
        parts = [f"without {part}" for part in self.findings.parts_left_out]
        return f"{self.state:<8} {self.name:<13} {self.seconds:6.1f} s  {'; '.join([told, *parts])}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parsed(arguments)
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is here: leave --device out, or give --device cpu")
    torch.set_num_threads(1 if device.type == "cpu" else os.cpu_count() or 1)
    if device.type == "cpu":
        # Where DeepSpeed is installed, accelerate asks it, and it would say in the output that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # In fp32 it is fp32 that is compared.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    wanted = options.only or [step.name for step in STEPS] + ["deepspeed"] * options.deepspeed
    chosen = [step for step in (*STEPS, DEEPSPEED) if step.name in wanted]
    began = time.monotonic()
    end = began + 60 * options.minutes
    results: list[Result] = []
    given = sys.argv[1:] if arguments is None else arguments
    about = {
        "command": " ".join(["python -m benchmarks.gpu_check", *given]),
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": here.about(device),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            device, options.short, options.seed, Path(folder), left=lambda: end - time.monotonic()
        )  # fmt: skip
        for number, step in enumerate(chosen):
            bench.reserved = sum(_needed(later, bench) for later in chosen[number + 1 :])
            results.append(Result(step.name))
            _write(options.out, about, results)
            _run(step, bench, results[-1])
            print(results[-1].line, flush=True)
            _write(options.out, about, results)
    failed = [result.name for result in results if result.state == FAILED]
    counts = {state: sum(result.state == state for result in results) for state in (OK, FAILED, LEFT_OUT)}
    print(
        f"{', '.join(f'{count} {state}' for state, count in counts.items())} in {time.monotonic() - began:.0f} s"
    )
    if failed:
        sys.exit(1)


def _needed(step: Step, bench: Bench) -> float:
    return step.seconds[2 if bench.cuda else 0 if bench.short else 1]


def _run(step: Step, bench: Bench, result: Result) -> None:
    """Run one step within the budget; whatever it raises is its result and no end of the run."""
    findings, left, needed = result.findings, bench.left(), _needed(step, bench)
    if left < needed:
        result.state = LEFT_OUT
        result.why = f"it takes about {needed:.0f} s, {max(0, left):.0f} s of the budget are left"
        return
    began = time.monotonic()
    try:
        # Libraries print as they like: the report's lines alone go to stdout.
        with redirect_stdout(sys.stderr), _within(left):
            step.run(bench, findings)
        result.state = FAILED if findings.faults else OK
        result.why = "; ".join(findings.faults)
    except LeftOut as reason:
        result.state, result.why = LEFT_OUT, str(reason)
    except OutOfTime:
        # What was wrong before the end is wrong all the same.
        result.state = FAILED if findings.faults else LEFT_OUT
        result.why = "; ".join([*findings.faults, f"cut off by the end of the budget after {left:.0f} s"])
    except Exception as error:
        result.state = FAILED
        result.why = "; ".join(
            [*findings.faults, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        )
        findings.figures["traceback"] = traceback.format_exc()
    finally:
        result.seconds = time.monotonic() - began
        try:
            bench.release()
        except RuntimeError as error:
            # After some errors a CUDA context is of no more use; the steps that follow will say the same.
            findings.figures["release"] = str(error)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in this thread once the time is over."""

    def ring(*_: object) -> None:
        raise OutOfTime

    mine = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, ring)
    timer = threading.Timer(seconds, signal.pthread_kill, (mine, signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


def _write(out: Path | None, about: dict[str, Any], results: list[Result]) -> None:
    """The report so far; whole at any moment, so that a killed run leaves it."""
    if out is None:
        return
    report = about | {"steps": [{**asdict(result), "line": result.line} for result in results]}
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(report, indent=1, default=str) + "\n")
    part.replace(out)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of the whole run")
    parser.add_argument("--out", type=Path, help="JSON file, written after each step")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one if not given")
    parser.add_argument("--short", action="store_true", help="on the CPU: the smallest shapes, no compiler")
    parser.add_argument("--deepspeed", action="store_true", help="also ZeRO 1, 2 and 3; needs components/")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps and no others")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and inputs")
    options = parser.parse_args(arguments)
    known = [step.name for step in (*STEPS, DEEPSPEED)]
    if unknown := sorted(set(options.only or []) - set(known)):
        parser.error(f"unknown step {', '.join(unknown)}; the steps are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
