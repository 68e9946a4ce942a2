"""How far the workers are, for whoever watches: a small actor that the driver asks."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from components.cluster import resources
from components.contract import Job


@dataclass
class Standing:
    """One moment of a training run."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    tokens_per_second: float
    mfu: float | None = None
    """None where the device's peak is not known."""
    gpu_memory_gib: float | None = None
    """Peak so far; None on a CPU."""


class Board:
    """What the workers write and the driver reads, and the other way round; it runs as a Ray actor."""

    def __init__(self) -> None:
        self._standing: Standing | None = None
        self._failure: tuple[str, int] | None = None
        self._notes: list[str] = []
        self._stopping = False
        self._stopped: int | None = None

    def note(self, text: str) -> None:
        """A line for the user."""
        self._notes.append(text)

    def notes(self, first: int) -> list[str]:
        """The lines from number `first` on."""
        return self._notes[first:]

    def put(self, standing: Standing) -> None:
        """Where rank 0 is."""
        self._standing = standing

    def get(self) -> Standing | None:
        """What `put` was given last."""
        return self._standing

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether they are asked to."""
        return self._stopping

    def stopped(self, step: int) -> None:
        """They have saved after `step` and left."""
        self._stopped = step

    def stopped_after(self) -> int | None:
        """The step after which they left early, or None."""
        return self._stopped

    def fail(self, message: str, status: int) -> None:
        """A failure that a restart would only repeat: message and exit status."""
        self._failure = self._failure or (message, status)

    def failure(self) -> tuple[str, int] | None:
        """What `fail` was told first."""
        return self._failure


def start_board() -> Any:
    """A `Board` on the node of this process, which no other node's end can take away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1)(Board).options(scheduling_strategy=here).remote()


class Teller:
    """Speaks to a board from wherever it is. A board that is lost never ends what it tells of."""

    def __init__(self, board: Any, timeout: float = 10.0):
        self._board, self._timeout = board, timeout

    def note(self, text: str) -> None:
        """A line for the user."""
        self._board.note.remote(text)

    def notes(self, first: int) -> list[str]:
        """The lines from number `first` on."""
        return self._ask(self._board.notes.remote(first)) or []

    def put(self, standing: Standing) -> None:
        """Where the run is."""
        self._board.put.remote(standing)

    def get(self) -> Standing | None:
        """Where the run is, if somebody knows."""
        return self._ask(self._board.get.remote())

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._ask(self._board.stop.remote())

    def stopping(self) -> bool:
        """Whether the workers are asked to."""
        return bool(self._ask(self._board.stopping.remote()))

    def stopped(self, step: int) -> None:
        """The workers have saved after `step` and leave."""
        self._ask(self._board.stopped.remote(step))

    def stopped_after(self) -> int | None:
        """The step after which the workers left early, or None."""
        return self._ask(self._board.stopped_after.remote())

    def fail(self, message: str, status: int) -> None:
        """A failure that a restart would only repeat."""
        self._ask(self._board.fail.remote(message, status))

    def failure(self) -> tuple[str, int] | None:
        """What `fail` was told, or None."""
        return self._ask(self._board.failure.remote())

    def _ask(self, asked: Any) -> Any:
        try:
            return ray.get(asked, timeout=self._timeout)
        except (RayError, GetTimeoutError):
            return None


class Watcher:
    """While it stands: a bar on a terminal, a plain line every few seconds in a log."""

    def __init__(self, teller: Teller, job: Job, every: float = 10.0, silence: float = 60.0):
        self._teller, self._job, self._every, self._silence = teller, job, every, silence
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
        notes = self._teller.notes(self._told)
        self._told += len(notes)
        for note in notes:
            self._job.say(note)
        return self._teller.get()

    def _lines(self) -> None:
        said, began, first = -1, time.monotonic(), 0
        last_said, news = 0.0, time.monotonic()
        while not self._stop.wait(1.0):
            now = self._standing()
            if now is None or now.step == said:
                if time.monotonic() - news >= self._silence:
                    news = time.monotonic()
                    self._job.say(self._quiet())
                continue
            news = time.monotonic()
            if said < 0:
                began, first = time.monotonic(), now.step
            if time.monotonic() - last_said >= self._every or now.step == now.steps:
                self._job.say(_line(now, began, first))
                last_said = time.monotonic()
            said = now.step

    def _quiet(self) -> str:
        settings = self._job.settings
        asked = f"{settings.workers} x ({settings.cpus_per_worker} CPU{', 1 GPU' if settings.gpu else ''})"
        return (
            f"no news for {self._silence:.0f} s; the workers ask for {asked}, the cluster has {resources()}"
        )

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
                    shown = f"loss {now.loss:.3f}  {now.samples_per_second:.0f} samples/s{_device(now)}"
                    bar.update(task, completed=now.step, total=now.steps, shown=shown)


def _line(now: Standing, began: float, first: int) -> str:
    spent = time.monotonic() - began
    left = (now.steps - now.step) * spent / (now.step - first) if now.step > first else None
    remaining = f", {_span(left)} left" if left else ""
    return (
        f"step {now.step}/{now.steps}  loss {now.loss:.3f}  "
        f"{now.samples_per_second:.0f} samples/s  {now.tokens_per_second:.0f} tokens/s{_device(now)}{remaining}"
    )


def _device(now: Standing) -> str:
    mfu = f"  MFU {now.mfu:.1%}" if now.mfu is not None else ""
    return mfu + (f"  {now.gpu_memory_gib:.1f} GiB" if now.gpu_memory_gib is not None else "")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
