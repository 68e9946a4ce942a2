"""How far the workers are, for whoever watches: a small actor that the driver asks."""

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from components.contract import Job


@dataclass
class Standing:
    """One moment of a training run."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    tokens_per_second: float


class Board:
    """What the workers write and the driver reads; it runs as a Ray actor."""

    def __init__(self) -> None:
        self._standing: dict[str, Any] | None = None
        self._failure: tuple[str, int] | None = None
        self._notes: list[str] = []

    def note(self, text: str) -> None:
        """A line for the user."""
        self._notes.append(text)

    def notes(self, first: int) -> list[str]:
        """The lines from number `first` on."""
        return self._notes[first:]

    def put(self, standing: dict[str, Any]) -> None:
        self._standing = standing

    def get(self) -> dict[str, Any] | None:
        return self._standing

    def fail(self, message: str, status: int) -> None:
        """A failure that a restart would only repeat: message and exit status."""
        self._failure = self._failure or (message, status)

    def failure(self) -> tuple[str, int] | None:
        return self._failure


class Watcher:
    """While it stands: a bar on a terminal, a plain line every few seconds in a log."""

    def __init__(self, board: Any, job: Job, every: float = 10.0):
        self._board, self._job, self._every = board, job, every
        self._stop = threading.Event()
        self._told = 0
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._standing()

    def _watch(self) -> None:
        import sys

        if sys.stderr.isatty():
            self._bar()
        else:
            self._lines()

    def _standing(self) -> Standing | None:
        try:
            notes, found = ray.get(
                [self._board.notes.remote(self._told), self._board.get.remote()], timeout=5
            )
            self._told += len(notes)
            for note in notes:
                self._job.say(note)
        except Exception:
            # Whoever watches must never end what it watches.
            return None
        return Standing(**found) if found else None

    def _lines(self) -> None:
        said, began, first = -1, time.monotonic(), 0
        last_said = 0.0
        while not self._stop.wait(1.0):
            now = self._standing()
            if now is None or now.step == said:
                continue
            if said < 0:
                began, first = time.monotonic(), now.step
            if time.monotonic() - last_said >= self._every or now.step == now.steps:
                self._job.say(_line(now, began, first))
                last_said = time.monotonic()
            said = now.step

    def _bar(self) -> None:
        from rich.console import Console

        columns = (
            TextColumn("[bold cyan]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(self._job.prefix or "train", total=None, shown="")
            while not self._stop.wait(0.5):
                if now := self._standing():
                    shown = f"loss {now.loss:.3f}  {now.samples_per_second:.0f} samples/s"
                    bar.update(task, completed=now.step, total=now.steps, shown=shown)


def _line(now: Standing, began: float, first: int) -> str:
    spent = time.monotonic() - began
    left = (now.steps - now.step) * spent / (now.step - first) if now.step > first else None
    remaining = f", {left:.0f} s left" if left else ""
    return (
        f"step {now.step}/{now.steps}  loss {now.loss:.3f}  "
        f"{now.samples_per_second:.0f} samples/s  {now.tokens_per_second:.0f} tokens/s{remaining}"
    )


def as_dict(standing: Standing) -> dict[str, Any]:
    """For the wire."""
    return asdict(standing)
