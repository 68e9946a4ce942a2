"""The command `llava` as a person runs it: a process of its own, or its entry point in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.repository import REPOSITORY

SETTINGS_OF_OTHERS = (
    "MLFLOW_TRACKING_URI",
    "RAY_ADDRESS",
    "LLAVA_TRACEBACK",
    "CI",
    "KUBERNETES_SERVICE_HOST",
)


LLAVA = [str(Path(sys.executable).parent / "llava")]


def environment(**extra: str) -> dict[str, str]:
    """Of a command that finds no cluster and no server but those of the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return {**kept, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore", **extra}


class Ended(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line on standard error."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""


def llava(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    seconds: float = 120,
    before: str = "",
) -> Ended:
    """Run `llava` in a process of its own, in `cwd`; `before`: Python that runs before it, such as a limit."""
    code = f"{before}\nfrom workflows.cli import main\nmain()"
    settings = {name: value for name, value in os.environ.items() if name not in SETTINGS_OF_OTHERS}
    settings |= {
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(cwd),
        "LLAVA_LOG_DIR": str(cwd / "logs"),
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=settings,
        input=stdin,
        text=True,
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
