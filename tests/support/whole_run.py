"""`llava train tiny`, made smaller: run once for all processes of a test run, for whoever needs a finished root."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.command import LLAVA, environment

SMALL = [
    "--set", "shard.scenes=320", "--set", "instruct.heldout_questions=40", "--set", "instruct.per_photo=1",
    "--set", "finetune.epochs=1", "--set", "pretrain.epochs=0.5", "--set", "pretrain.workers=1",
    "--set", "evaluate.workers=1",
]  # fmt: skip
SHARED = [*SMALL, "--set", "finetune.epochs=2", "--set", "finetune.zero_stage=3"]
"""Of the run that is shared: stage 1 with ZeRO-2 on one worker, stage 2 with ZeRO-3 on two."""


@dataclass
class Run:
    """One `llava` command: its status, what it wrote, and its summary."""

    status: int
    err: str
    summary: dict[str, Any]


def llava(*arguments: str, cwd: Path, **extra: str) -> Run:
    """Run `llava ARGUMENTS --json` in `cwd`; `extra` is added to its environment."""
    done = subprocess.run(
        [*LLAVA, *arguments, "--json"],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return Run(done.returncode, done.stderr, json.loads(lines[-1]) if lines else {})


def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """The folder in which `llava train tiny` with `SHARED` ran, and the run.

    Who comes first makes it, the others wait. `runs/` in it may be read and copied.
    """
    base = tmp_path_factory.getbasetemp()
    # Under xdist each process has a folder of its own inside the run's.
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, kept = base / "trained", base / "trained.json"
    with FileLock(base / "trained.lock"):
        if not kept.exists():
            folder.mkdir()
            run = llava("train", "tiny", *SHARED, cwd=folder)
            assert run.status == 0, run.err
            kept.write_text(json.dumps(asdict(run)))
    return folder, Run(**json.loads(kept.read_text()))
