"""A side of a comparison runs in a fresh process, so that its CPU time and its memory are its own."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava.errors import LlavaError


def command(
    parser: argparse.ArgumentParser,
    sides: Iterable[str],
    side: Callable[[argparse.Namespace], None],
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
) -> None:
    """The command line of a comparison: its own options in `parser`, here what all have; then one side, or all."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print medians and rounds as JSON")
    parser.add_argument("--markdown", type=Path, help="write the result there")
    parser.add_argument(
        "--photos", type=Path, help="made there and kept, and used again; default: a temporary folder"
    )
    parser.add_argument("--side", choices=list(sides), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        report = measure(options, Path(folder))
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(report))
    print(json.dumps(report, indent=1) if options.json else markdown(report))


@dataclass
class Measured:
    """What the rounds of one side came to."""

    name: str
    what: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    absent: str = ""
    """Why there is nothing, where a package or a server is missing."""

    def median(self, key: str) -> float:
        """The middle of the rounds."""
        return statistics.median(found[key] for found in self.rounds)

    @property
    def per_core(self) -> float:
        """Images per second of CPU time."""
        return statistics.median(found["images"] / found["cpu"] for found in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        if not self.rounds:
            return {"name": self.name, "what": self.what, "absent": self.absent}
        keys = [key for key, value in self.rounds[0].items() if isinstance(value, int | float)]
        medians = {key: self.median(key) for key in keys}
        return {"name": self.name, "what": self.what, "images_per_cpu_second": self.per_core, **medians} | {
            "rounds": self.rounds
        }


class Clock:
    """Wall and CPU seconds (children that ended too) since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), _cpu()

    def read(self, images: int, **more: float) -> dict[str, float]:
        """What a side prints; `peak` is the process's largest resident memory in bytes."""
        # ru_maxrss would count the parent's memory too, which a child shares until it runs its own program.
        line = next(
            one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")
        )
        peak = int(line.split()[1]) * 1024
        spent = {"wall": time.perf_counter() - self.wall, "cpu": _cpu() - self.cpu}
        return {"images": images, **spent, "peak": peak, **more}


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_side(script: str, name: str, arguments: Sequence[str], env: Mapping[str, str] = {}) -> dict[str, Any]:
    """Run `script --side name` in a fresh process; returns what it printed last as JSON."""
    run = subprocess.run(
        [sys.executable, script, "--side", name, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise LlavaError(f"{name}: status {run.returncode}: {run.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def rotate(sides: Sequence[Measured], rounds: int, run: Callable[[Measured], dict[str, Any]]) -> None:
    """Every round runs every side once; each begins with another one."""
    there = [side for side in sides if not side.absent]
    for number in range(rounds):
        first = number % max(1, len(there))
        for side in there[first:] + there[:first]:
            side.rounds.append(found := run(side))
            pace = f"{found['images'] / found['cpu']:,.0f} images per CPU second, {found['wall']:.1f} s"
            print(f"round {number + 1}, {side.name}: {pace}", file=sys.stderr, flush=True)


def absent(*packages: str) -> str:
    """Why a side cannot run: the packages that are missing; "" if none is."""
    missing = [package for package in packages if not found_version(package)]
    return f"{', '.join(missing)} is not installed" if missing else ""


def found_version(package: str) -> str | None:
    """The installed version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
