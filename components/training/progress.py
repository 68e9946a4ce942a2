"""How far a training run is, for the person who watches: a bar on a terminal, plain lines in a log."""

import threading
import time
from typing import Any

from rich import progress as bars

from components.contract import Job
from components.contract.pace import Due, Speed
from components.ray_cluster.connection import resources
from components.training.board import Progress, ProgressClient


class Watcher:
    """While it stands: a bar on a terminal, a plain line every few seconds in a log."""

    def __init__(self, client: ProgressClient, job: Job[Any], every: float = 10.0, silence: float = 60.0):
        self._client, self._job, self._every, self._silence = client, job, every, silence
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

    def _standing(self) -> Progress | None:
        notes = self._client.notes(self._told)
        self._told += len(notes)
        for note in notes:
            self._job.say(note)
        return self._client.get()

    def _lines(self) -> None:
        said, speed = -1, Speed()
        due, news = Due(self._every), time.monotonic()
        while not self._stop.wait(1.0):
            now = self._standing()
            if now is None or now.step == said:
                if time.monotonic() - news >= self._silence:
                    news = time.monotonic()
                    self._job.say(self._quiet())
                continue
            news = time.monotonic()
            if said < 0:
                speed = Speed(now.step)
            if due() or now.step == now.steps:
                self._job.say(_line(now, speed))
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
            bars.TextColumn("[bold cyan]{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[shown]}"),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(self._job.component or "train", total=None, shown="")
            while not self._stop.wait(0.5):
                if now := self._standing():
                    shown = f"loss {now.loss:.3f}  {now.samples_per_second:.0f} samples/s{_device(now)}"
                    bar.update(task, completed=now.step, total=now.steps, shown=shown)


def _line(now: Progress, speed: Speed) -> str:
    left = speed.left(now.step, now.steps) if now.step < now.steps else None
    remaining = f", {left} left" if left else ""
    return (
        f"step {now.step}/{now.steps}  loss {now.loss:.3f}  "
        f"{now.samples_per_second:.0f} samples/s  {now.tokens_per_second:.0f} tokens/s{_device(now)}{remaining}"
    )


def _device(now: Progress) -> str:
    mfu = f"  MFU {now.mfu:.1%}" if now.mfu is not None else ""
    return mfu + (f"  {now.gpu_memory_gib:.1f} GiB" if now.gpu_memory_gib is not None else "")
