"""What many ranks cost each other, and what a slow or a killed one does to the others: no model, all the rest is real.

    python benchmarks/ranks.py --out benchmarks/results

Each number of ranks takes four groups of processes: one trains, with a slow rank for a while, is told to stop and
leaves with a checkpoint; one resumes from it and loses a rank in a step; one loses a rank in a save; half as many ranks
resume. `benchmarks/at_scale/stand_ins.py` has what stands in for a model, for Ray and for MLflow.
"""

import argparse
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.at_scale import crowd, crowd_page, growth, output, stand_ins
from benchmarks.at_scale.group import Outcome, run_group, values_of
from components.contract import open_store
from components.training.checkpoints import COMMITTED
from components.training.record import CHECKPOINTS

PACKAGES = ("torch", "numpy")
BOUND = 1e-3
"""Seconds of CPU time that a step may take of rank 0 more than of the others."""


def main() -> None:
    """The command line."""
    options = parsed()
    began = time.time()
    index = stand_ins.index_of(options.samples)
    stand_ins.warm()
    found = []
    for world in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found.append(measured(options, world, index, Path(folder)))
        print(f"{world} ranks: done after {time.time() - began:.0f} s", file=sys.stderr)
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/ranks.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
        "options": {name: str(value) for name, value in vars(options).items()},
        "bound": BOUND,
        "ranks": found,
        "planning": growth.planning(index, options.plan_ranks, options.global_batch, options.plan_steps),
    }
    report["growth"] = growth.fits(found)
    report["minutes"] = (time.time() - began) / 60
    output.write(options.out, "ranks", crowd_page.page(report), report)
    over = [row["world"] for row in found if row["bookkeeping"]["extra"] > BOUND]
    if over:
        sys.exit(f"rank 0 takes more than {BOUND * 1e3:g} ms a step beyond the others at {over} ranks")


def measured(options: argparse.Namespace, world: int, index: Any, folder: Path) -> dict[str, Any]:
    """All of one number of ranks."""
    root = folder / "artifact"
    plain = {
        "steps": options.steps,
        "slow_steps": options.slow_steps,
        "stop": True,
        "primitives": options.primitives,
    }
    middle = stand_ins.WARM + options.steps // 2
    trained = values_of(_group(options, world, index, folder, "trained", {**plain, "every": middle}))
    stopped = _checkpoints(root)
    last = int(stopped[-1].name[:9])
    result = growth.of_training(trained, middle) | {"world": world, "commit": _coordination(stopped[-1])}
    result["stop"] = growth.of_stop(trained, float((folder / "trained" / stand_ins.STOP).read_text()))
    # It goes on, and a rank is killed.
    kill = {
        "steps": options.steps,
        "slow_steps": 0,
        "kill_at": stand_ins.WARM,
        "every": 10**8,
        "primitives": 0,
    }
    for name, job in (
        ("step", {**kill, "kill": "step"}),
        ("save", {**kill, "kill": "save", "every": last + stand_ins.WARM}),
    ):
        outcomes = _group(options, world, index, folder, f"killed-{name}", job)
        result[f"killed in a {name}"] = _after_the_kill(
            outcomes, folder / f"killed-{name}", root, stopped, name
        )
        if name == "step":
            result["resume"] = growth.of_resume([one.value for one in outcomes if one.value], last)
    halves = values_of(
        _group(
            options,
            max(1, world // 2),
            index,
            folder,
            "half",
            {**plain, "steps": options.slow_steps, "slow_steps": 0, "every": 10**8, "primitives": 0},
        )
    )
    result["resume on half"] = growth.of_resume(halves, last)
    result["unfinished left"] = len(_checkpoints(root, committed=False))
    return result


def _group(
    options: argparse.Namespace, world: int, index: Any, folder: Path, name: str, job: dict[str, Any]
) -> list[Outcome]:
    signals = folder / name
    signals.mkdir()
    (folder / "scratch").mkdir(exist_ok=True)
    whole = {
        "root": str(folder / "artifact"),
        "scratch": str(folder / "scratch"),
        "signals": str(signals),
        "global_batch": options.global_batch,
        "step_seconds": options.step_seconds,
        "late_seconds": options.late_seconds,
        **job,
    }
    return run_group(crowd.member, world, whole, index, seconds=options.seconds, timeout=options.gloo_timeout)


def _after_the_kill(
    outcomes: list[Outcome], signals: Path, root: Path, before: list[Path], name: str
) -> dict[str, Any]:
    killed = float((signals / stand_ins.KILLED).read_text())
    ended = [one.error for one in outcomes if one.value is None]
    assert ended == ["died: SIGKILL"], ended
    alive = [one.value for one in outcomes if one.value is not None]
    noticed = sorted(one["noticed"] - killed for one in alive)
    assert _checkpoints(root) == before, f"killed in a {name}: something was committed"
    return {
        "noticed": [noticed[0], noticed[len(noticed) // 2], noticed[-1]],
        "left": max(one["left"] for one in alive) - killed,
        "errors": sorted({one["error"][:100] for one in alive}),
        "committed": 0,
        "unfinished": len(_checkpoints(root, committed=False)),
    }


def _checkpoints(root: Path, committed: bool = True) -> list[Path]:
    """The checkpoints' folders, by step."""
    found = (path for path in (root / CHECKPOINTS).iterdir() if path.is_dir())
    return sorted(path for path in found if (path / COMMITTED).is_file() == committed)


def _coordination(checkpoint: Path) -> dict[str, float]:
    """Of a committed checkpoint, by the times of its files."""
    shares = [path.stat().st_mtime for path in checkpoint.glob("share-*.json")]
    marker = (checkpoint / COMMITTED).stat()
    state = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return {
        "first to last share": max(shares) - min(shares),
        "last share to marker": marker.st_mtime - max(shares),
        "marker bytes": marker.st_size,
        "state bytes": state,
        "files": len(list(open_store(checkpoint).list())),
    }


def parsed() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="processes of a group")
    parser.add_argument("--samples", type=int, default=200_000, help="of the made-up index")
    parser.add_argument("--global-batch", type=int, default=256, help="samples of a step, over all ranks")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each group")
    parser.add_argument("--slow-steps", type=int, default=15, help="steps with a late rank")
    parser.add_argument("--step-seconds", type=float, default=0.02, help="that a step sleeps on every rank")
    parser.add_argument("--late-seconds", type=float, default=0.05, help="that a late rank sleeps more")
    parser.add_argument(
        "--gloo-timeout", type=float, default=60.0, help="seconds until a collective gives up"
    )
    parser.add_argument("--primitives", type=int, default=30, help="collectives of each kind, back to back")
    parser.add_argument(
        "--plan-ranks",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64, 128, 256, 512],
        help="ranks that are planned for",
    )
    parser.add_argument("--plan-steps", type=int, default=10, help="steps that are planned for each")
    parser.add_argument("--seconds", type=float, default=600.0, help="until a group is given up")
    parser.add_argument("--folder", type=Path, help="where checkpoints are put, and deleted again")
    parser.add_argument("--out", type=Path, help="folder for the page and its figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
