"""Saving, resuming, starting and exporting a training: seconds and host memory of each rank, before and after a change.

    git worktree add /tmp/before 8cffe81
    python benchmarks/checkpoints.py --before /tmp/before --out benchmarks/results

Each side is a process of its own that imports its checkout once and forks a fresh gloo group for each measurement; the
sides take turns. The arithmetic for 7B and 13B that follows has its formulas beside it.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is freed goes back to the system: else malloc keeps up to 32 MiB a block, and its memory is no measure of ours.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "262144")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.at_scale import output, page, projection
from benchmarks.at_scale.models import Made, make_model

ROOT = Path(__file__).resolve().parents[1]
BEFORE, AFTER = "before", "after"
PACKAGES = ("torch", "transformers", "deepspeed")


class Side:
    """A checkout, in a process that measures what it is told to."""

    def __init__(self, name: str, checkout: Path) -> None:
        self.name = name
        self.new = (checkout / "llava/placing.py").is_file()
        path = os.pathsep.join([str(checkout), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.at_scale.life"],
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank found."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({**job, "new": self.new}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(
                f"{self.name}: the process ended with status {self._process.wait()}; its errors are above"
            )
        found: list[dict[str, Any]] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def main() -> None:
    """The command line."""
    options = parsed()
    began = time.time()
    sides = [Side(AFTER, ROOT)]
    if options.before is not None:
        sides.insert(0, Side(BEFORE, options.before.resolve()))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = make_model(Path(folder) / "model", options.parameters, getattr(torch, options.stored))
        runs = measured(options, sides, Path(folder), made)
    for side in sides:
        side.close()
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/checkpoints.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
        "revisions": {side.name: revision for side in sides if (revision := _revision(side, options))},
        "minutes": (time.time() - began) / 60,
        "model": made._asdict() | {"stored": options.stored},
        "rounds": options.rounds,
        "runs": runs,
        "summary": summary(runs),
    }
    rates = projection.Rates(
        options.disk_gbs, options.network_gbs, options.host_gbs, options.link_gbs, sha_gbs(), options.per_node
    )
    report["rates"] = rates._asdict()
    report["projection"] = projection.table(rates)
    report["formulas"] = projection.checked(report["summary"], made)
    output.write(options.out, "checkpoints", page.checkpoints(report), report)


def measured(
    options: argparse.Namespace, sides: list[Side], folder: Path, made: Made
) -> list[dict[str, Any]]:
    """Every side, ZeRO stage and number of ranks, `--rounds` times; the sides alternate and take turns to be first."""
    found = []
    for number in range(options.rounds):
        for zero in options.zero:
            for world in options.ranks:
                for side in sides if number % 2 == 0 else reversed(sides):
                    with tempfile.TemporaryDirectory(dir=folder) as root:
                        job = {
                            "model": str(folder / "model"),
                            "root": f"{root}/artifact",
                            "scratch": root,
                            "zero": zero,
                            "world": world,
                            "seconds": options.seconds,
                        }
                        ranks = side.measure(job)
                    _check(side, ranks, made)
                    found.append(
                        {"side": side.name, "zero": zero, "ranks": world, "round": number, "found": ranks}
                    )
                    print(f"round {number + 1}: {side.name}, ZeRO-{zero}, {world} ranks", file=sys.stderr)
    return found


def _check(side: Side, ranks: list[dict[str, Any]], made: Made) -> None:
    """What was written is what the arithmetic says: 12 bytes per parameter that trains, 2 per parameter exported."""
    for what, wanted in (("state", 12 * made.trainable), ("model", 2 * made.parameters)):
        found = ranks[0][what]
        if not wanted <= found <= 1.05 * wanted + (1 << 20):
            sys.exit(f"{side.name}: the {what} has {found:,} bytes, {wanted:,} were expected")


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per side, stage, number of ranks and phase: medians over the rounds."""
    table = []
    for key in sorted({(run["zero"], run["ranks"], run["side"]) for run in runs}):
        mine = [run["found"] for run in runs if (run["zero"], run["ranks"], run["side"]) == key]
        row: dict[str, Any] = dict(zip(("zero", "ranks", "side"), key, strict=True))
        row["state"] = mine[0][0]["state"]
        row["held"] = statistics.median(max(rank["held"] for rank in ranks) for ranks in mine)
        for phase in mine[0][0]["phases"]:
            of_phase = [[rank["phases"][phase] for rank in ranks] for ranks in mine]
            row[phase] = {
                "seconds": statistics.median(max(one["seconds"] for one in ranks) for ranks in of_phase),
                "cpu_seconds": statistics.median(
                    sum(one["cpu_seconds"] for one in ranks) for ranks in of_phase
                ),
                **{
                    f"{kind}_{name}": statistics.median(
                        choose([one[kind] for one in ranks]) for ranks in of_phase
                    )
                    for kind in ("anonymous", "kept", "mapped")
                    for name, choose in (("median", statistics.median), ("max", max))
                },
            }
        table.append(row)
    return table


def sha_gbs() -> float:
    """GB a second that one core hashes, the best of five."""
    block = os.urandom(1 << 26)

    def once() -> float:
        began = time.perf_counter()
        hashlib.sha256(block)
        return len(block) / (time.perf_counter() - began) / 1e9

    return max(once() for _ in range(5))


def _revision(side: Side, options: argparse.Namespace) -> str:
    where = ROOT if side.name == AFTER else options.before
    done = subprocess.run(
        ["git", "-C", str(where), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def parsed() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of the revision to compare with")
    parser.add_argument("--parameters", type=float, default=150e6, help="of the random LLaVA, about")
    parser.add_argument(
        "--stored",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="precision of the model's file; it trains in bfloat16",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="gloo processes")
    parser.add_argument("--zero", type=int, nargs="+", default=[2, 3], choices=[1, 2, 3], help="ZeRO stages")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    parser.add_argument("--seconds", type=float, default=900.0, help="until a group of ranks is given up")
    parser.add_argument("--folder", type=Path, help="where model and checkpoints are put, and deleted again")
    parser.add_argument("--out", type=Path, help="folder for the page and its figures as JSON")
    parser.add_argument("--disk-gbs", type=float, default=2.0, help="GB/s that a node writes to its disk")
    parser.add_argument("--network-gbs", type=float, default=1.25, help="GB/s between a node and the store")
    parser.add_argument("--host-gbs", type=float, default=20.0, help="GB/s from a GPU to its host")
    parser.add_argument(
        "--link-gbs", type=float, default=50.0, help="GB/s that a rank gathers from the others"
    )
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node")
    options = parser.parse_args()
    options.parameters = int(options.parameters)
    if options.before is not None and not (options.before / "llava").is_dir():
        parser.error(f"--before {options.before} is no checkout: git worktree add {options.before} REVISION")
    return options


if __name__ == "__main__":
    main()
