"""A command that starts a local Ray and works on it until it is stopped, and what is left of it afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import psutil

from tests.support.command import environment

WAIT = 240.0  # seconds: a busy machine starts slowly
MARK = "LLAVA_TEST_MARK"
_DRIVER = """
import sys, threading, time
from components.ray_cluster import connection, starting
from workflows import cli
starting.START_SECONDS = starting.JOIN_SECONDS = float(sys.argv[1])

def app():
    with connection.disconnecting():
        print("starting", flush=True)
        connection.connect()
        import ray

        @ray.remote
        class Busy:
            def work(self, seconds):
                time.sleep(seconds)

        actors = [Busy.remote() for _ in range(2)]
        ray.get([one.work.remote(0) for one in actors])
        print("ready", flush=True)
        failed = []

        def fit():
            try:
                while True:
                    ray.get([one.work.remote(0.2) for one in actors])
                    print("worked", flush=True)
            except Exception as error:
                failed.append(error)

        threading.Thread(target=fit, daemon=True).start()
        while not failed:
            time.sleep(0.05)
        raise connection.LlavaError("the cluster is gone")

cli.app = app
cli.main()
"""


def _as_from_a_shell() -> None:
    """No signal is ignored: whoever runs the tests in the background or under nohup has some ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Signalled:
    """The command in a session of its own, with a folder for Ray and a mark in its environment."""

    def __init__(
        self, seconds: float = WAIT, command: list[str] | None = None, cwd: Path | None = None, **extra: str
    ) -> None:
        """`command`, in `cwd`, takes the place of one that starts Ray and does nothing with it."""
        self.folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
        self.mark = uuid4().hex
        self._out, self._err = self.folder / "out.txt", self.folder / "err.txt"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command or [sys.executable, "-c", _DRIVER, str(seconds)],
                cwd=cwd,
                env=environment(RAY_TMPDIR=str(self.folder), **{MARK: self.mark}, **extra),
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_as_from_a_shell,  # noqa: PLW1509
            )

    def __enter__(self) -> Signalled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for one in self.left():
            one.kill()
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def out(self) -> str:
        """What it wrote on standard output."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it wrote on standard error."""
        return self._err.read_text()

    def until(self, told: str) -> None:
        """Wait until it prints `told`."""
        end = time.monotonic() + WAIT
        while told not in self._out.read_text():
            assert self.process.poll() is None, self.err
            assert time.monotonic() < end, f"no {told!r}: {self.err}"
            time.sleep(0.02)

    def until_there(self, name: str) -> psutil.Process:
        """Wait for its process with that title."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            for one in self.left():
                if name in title(one):
                    return one
            time.sleep(0.02)
        raise AssertionError(f"no {name}: {self.err}")

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(4 * WAIT)

    def left(self) -> list[psutil.Process]:
        """Whatever runs with its mark, has a file in its folder open, or names the folder in its arguments."""
        return [one for one in psutil.process_iter() if one.pid != os.getpid() and self._is_of_it(one)]

    def left_after(self, seconds: float) -> list[str]:
        """Titles of what still runs `seconds` later; none as soon as nothing does."""
        end = time.monotonic() + seconds
        while (found := self.left()) and time.monotonic() < end:
            time.sleep(0.1)
        return [title(one) for one in found]

    def folders(self) -> list[Path]:
        """The folders that its clusters have now."""
        return [path for path in self.folder.iterdir() if path.is_dir()]

    def _is_of_it(self, one: psutil.Process) -> bool:
        try:
            if one.status() == psutil.STATUS_ZOMBIE:
                return False
            if one.environ().get(MARK) == self.mark or any(
                str(self.folder) in part for part in one.cmdline()
            ):
                return True
            opened = Path(f"/proc/{one.pid}/fd").iterdir()
            return any(str(entry.readlink()).startswith(f"{self.folder}/") for entry in opened)
        except (psutil.Error, OSError, ValueError):
            return False


def title(process: psutil.Process) -> str:
    """Its command line; nothing where it has just ended."""
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return ""
