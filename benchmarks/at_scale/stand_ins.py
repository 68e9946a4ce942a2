"""What stands in for a model, for data, for the driver, for MLflow and for Ray, each by the least that does."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import distributed

from components.training.board import ProgressActor, ProgressClient
from components.training.observers.stopping import Stopping
from components.training.record import MetricSender
from llava.conversation import Encoded
from llava.data.plan import SampleIndex
from llava.training.checkpoint import PARTS, Fragment, SavedState

TENSORS, ELEMENTS = 300, 4096
"""About as many tensors as a 7B has, 14.7 MB of state. Each rank holds a piece of every tensor, as in ZeRO-3."""
ROWS_OF_A_GROUP = 200
WARM = 10
"""Steps before those that are measured."""
STOP, KILLED = "stop", "killed"
"""Files that name a moment on the monotonic clock."""


def index_of(samples: int) -> SampleIndex:
    """Made-up samples of text, log-normal in length, in row groups as large as those of a dataset."""
    random = np.random.default_rng(0)
    number = np.arange(samples)
    tokens = np.clip(random.lognormal(5.0, 0.7, samples), 20, 1500).astype(np.int64)
    return SampleIndex(
        group=number // ROWS_OF_A_GROUP,
        row=number % ROWS_OF_A_GROUP,
        part=np.zeros(samples, np.int64),
        tokens=tokens,
        supervised=tokens // 2,
        images=np.zeros(samples, np.int64),
    )


class StandIn:
    """An engine that computes nothing and sleeps as long as a step would take."""

    device = torch.device("cpu")

    def __init__(self, job: dict[str, Any]) -> None:
        self.rank, self.world, self.updates = distributed.get_rank(), distributed.get_world_size(), 0
        self._job, self._first = job, 0

    def loss(self, row: Any) -> torch.Tensor:
        """A number."""
        if self._job.get("kill") == "step" and self._is_victim():
            die(self._job)
        return torch.tensor(float(len(row.predict)))

    def backward(self, loss_sum: torch.Tensor, supervised: int, last: bool) -> None:
        """Nothing."""

    def step(self, learning_rate: float) -> float:
        """As long as a step takes, and longer on a slow rank."""
        self.updates += 1
        done, job = self.updates - self._first, self._job
        plain = WARM + job["steps"]
        late = self.rank == self.world - 1 and plain < done <= plain + job["slow_steps"]
        time.sleep(job["step_seconds"] + (job["late_seconds"] if late else 0.0))
        if self.rank == self.world - 1 and done == plain + job["slow_steps"] + 1 and job.get("stop"):
            (Path(job["signals"]) / STOP).write_text(str(time.monotonic()))
        return 1.0

    def fragments(self) -> list[Fragment]:
        """A piece of every tensor."""
        first, last = (ELEMENTS * number // self.world for number in (self.rank, self.rank + 1))
        return [
            Fragment(
                f"tensor.{number}",
                first,
                {part: _values(part, number, first, last, self.updates) for part in PARTS},
            )
            for number in range(TENSORS)
        ]

    def restore(self, saved: SavedState) -> None:
        """Read this rank's pieces, whoever wrote them, and compare them with what was written."""
        self.updates = self._first = saved.update
        first, last = (ELEMENTS * number // self.world for number in (self.rank, self.rank + 1))
        for part in PARTS:
            for number in range(TENSORS):
                found = saved.read(part, f"tensor.{number}", first, last)
                assert torch.equal(found, _values(part, number, first, last, saved.update)), (part, number)

    def _is_victim(self) -> bool:
        return self.rank == self.world - 1 and self.updates - self._first == self._job["kill_at"]


def _values(part: str, tensor: int, first: int, last: int, update: int) -> torch.Tensor:
    return torch.arange(first, last, dtype=torch.float32) + 5000 * PARTS.index(part) + tensor + update


def warm() -> None:
    """Before the ranks are forked: torch loads what an operation needs when it is first used."""
    values = _values(PARTS[0], 0, 0, ELEMENTS, 1)
    assert torch.equal(values, torch.empty_like(values).copy_(values))


def die(job: dict[str, Any]) -> None:
    """At once, and leave the moment."""
    (Path(job["signals"]) / KILLED).write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


class Texts:
    """Rows whose text is their length."""

    def __init__(self, index: SampleIndex) -> None:
        self._index = index
        self.weights = None

    def row(self, group: int, row: int) -> dict[str, Any]:
        """A conversation."""
        sample = group * ROWS_OF_A_GROUP + row
        turns = [
            {"from": "human", "value": ""},
            {"from": "gpt", "value": f"{self._index.tokens[sample]} {self._index.supervised[sample]}"},
        ]
        return {"id": f"{sample:09d}", "image": None, "more_images": None, "conversations": turns}

    def prefetch(self, groups: Any) -> None:
        """They are made, not read."""

    def keep_only(self, groups: Any) -> None:
        """Nothing is kept."""


class Lengths:
    """As many tokens as the text says."""

    image_id = -1

    def encode(self, turns: list[dict[str, str]], images: int) -> Encoded:
        """Half of them supervised."""
        tokens, supervised = (int(word) for word in turns[-1]["value"].split())
        labels = [-100] * (tokens - supervised) + [1] * supervised
        return Encoded([1] * tokens, labels, images)


class Actor:
    """The driver's board without Ray: its methods run in this process; one is told to stop by a file."""

    def __init__(self, signals: Path) -> None:
        self._board, self._signals = ProgressActor(), signals
        self.heard: float | None = None

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._board, name))

    @property
    def stopping(self) -> Any:
        """Whether the order is there; the first time that it is seen is kept."""

        def look() -> bool:
            there = (self._signals / STOP).exists()
            if there and self.heard is None:
                self.heard = time.monotonic()
            return there

        return SimpleNamespace(remote=look)


class Client(ProgressClient):
    """What it asks is answered already."""

    def _ask(self, asked: Any) -> Any:
        return asked


class Halting(Stopping):
    """Ray's question to all nodes is a barrier that nobody answers with yes."""

    def _taken_away(self) -> bool:
        distributed.barrier()
        return False


def sender() -> MetricSender:
    """What it is given is dropped at the far end."""
    far: Any = SimpleNamespace(
        steps=lambda name: set(), metric_rows=lambda rows: None, tags=lambda values: None
    )
    return MetricSender(far)
