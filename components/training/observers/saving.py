"""Checkpoints, and the ids that made each step, which the ranks tell each other when something is saved."""

from pathlib import Path
from typing import Any

from components.training import checkpoints
from components.training.observers.base import Observer, RunState
from components.training.record import HISTORY, SAMPLES, Entry
from llava.data.jsonl import to_jsonl
from llava.training import checkpoint as files
from llava.training.loop import StepReport, gathered


class Saving(Observer):
    """Every few steps, and before leaving; it comes last, so that a checkpoint holds what the others noted."""

    def __init__(self, state: RunState, identity: dict[str, Any]) -> None:
        super().__init__(state)
        self._identity = identity
        self._own: list[list[str]] = []
        """This rank's samples of each step since the last save."""
        task = state.task
        self._saver = checkpoints.Saver(
            task.folder, task.guard, task.settings.keep_checkpoints, state.scratch, task.earlier
        )

    def stepped(self, report: StepReport, entry: Entry) -> None:
        self._own.append(report.ids)

    def leaving(self, report: StepReport) -> None:
        state = self.state
        if state.stopped or report.step % state.task.settings.checkpoint_every == 0:
            self._save(report.step)
        if state.stopped and state.chief:
            self._saver.wait()
            state.client.stopped(report.step)

    def finished(self) -> None:
        if self.state.chief:
            # First, so that no more than one state lies in memory.
            self._saver.wait()
        self._collect_samples()

    def close(self) -> None:
        """A checkpoint that is under way arrives."""
        self._saver.close()

    def _save(self, step: int) -> None:
        state = self.state
        if state.chief:
            self._saver.wait()
        weights = state.engine.state()
        self._collect_samples()
        if not state.chief or weights is None:
            return
        position = files.Position(step, self._identity)
        record = {HISTORY: to_jsonl(state.history), SAMPLES: to_jsonl(state.samples)}

        def write(folder: Path) -> None:
            files.write(folder, weights, position)
            for name, data in record.items():
                (folder / name).write_bytes(data)

        self._saver.save(step, write)

    def _collect_samples(self) -> None:
        state = self.state
        first = len(state.history) - len(self._own) + 1
        for number, per_rank in enumerate(zip(*gathered(state.engine, self._own), strict=True)):
            state.samples.append({"step": first + number, "ids": [name for ids in per_rank for name in ids]})
        self._own = []
