"""The moments of a training run at which something may be done, and what an observer knows of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.contract import Folder
from components.training.board import ProgressClient
from components.training.checkpoints import CheckpointFolders
from components.training.record import Entry
from components.training.task import Task
from llava.data.plan import BatchPlan
from llava.training.engine import Engine
from llava.training.loop import StepReport


@dataclass
class RunState:
    """What all observers of one rank share."""

    task: Task
    engine: Engine
    plan: BatchPlan
    scratch: Path
    """An empty local folder, gone when the run ends."""
    client: ProgressClient
    folders: CheckpointFolders
    """Where checkpoints lie."""
    start: str
    """Names this start of the worker group, the same on all ranks."""
    checkpoint: Folder | None = None
    """The newest checkpoint, made or gone on from."""
    history: list[Entry] = field(default_factory=list)
    """A line per step, from the first step of the artifact on."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """On rank 0: the ids of each step that an earlier group has made."""
    stopped: bool = False
    """Whether the run leaves after this step, with a checkpoint."""

    @property
    def chief(self) -> bool:
        """Whether this is rank 0, which keeps the record and speaks for all."""
        return self.engine.rank == 0


class Observer:
    """Something that happens beside the loop. Every hook is called on every rank, in the order of the observers.

    A hook in which ranks talk to each other (a collective) must do so on all of them, whatever each has seen.
    """

    def __init__(self, state: RunState) -> None:
        self.state = state

    def resumed(self, step: int) -> None:
        """Before the first step: `step` steps were done by an earlier try, and stand in the history."""

    def word(self) -> int:
        """In each step: what this rank tells the others, as bits (`loop.train`)."""
        return 0

    def stepped(self, report: StepReport, entry: Entry) -> None:
        """After each step; `entry` is its line of the history, and may be added to."""

    def leaving(self, report: StepReport) -> None:
        """After each step but the last, when all have seen it: `state.stopped` may be set, on all ranks alike."""

    def finished(self) -> None:
        """After the last step."""

    def close(self) -> None:
        """However the run ends: let go of threads and files."""
