"""Checkpoints, with the ids that made each step: every rank keeps its own share of both."""

from typing import Any

from components.training.checkpoints import Checkpoint, Saver
from components.training.observers.base import Observer, RunState
from components.training.record import HISTORY, SAMPLES, Entry
from llava.data.jsonl import from_jsonl, to_jsonl
from llava.training import checkpoint as files
from llava.training.loop import StepReport

_OWN = "ids-{:05d}.jsonl"
"""A rank's samples of each step since its group started."""
_IDS = "ids-"


class Saving(Observer):
    """Every few steps, before leaving and after the last step; it comes last, so that a checkpoint holds what the
    others noted."""

    def __init__(self, state: RunState, identity: dict[str, Any]) -> None:
        super().__init__(state)
        self._identity = identity
        self._own: list[dict[str, Any]] = []
        self._saved = 0
        """The step of the last checkpoint, also of one that was gone on from."""
        self._saver = Saver(state.folders, state.engine.rank, state.engine.world, state.start, state.scratch)

    def resumed(self, step: int) -> None:
        self._saved = step
        if self.state.chief:
            self.state.client.stopped(None)

    def stepped(self, report: StepReport, entry: Entry) -> None:
        self._saver.check()
        self._own.append({"step": report.step, "ids": report.ids})

    def leaving(self, report: StepReport) -> None:
        state = self.state
        if state.stopped or report.step % state.task.settings.checkpoint_every == 0:
            self._save(report.step)
        if state.stopped:
            self._saver.wait()
            if state.chief:
                state.client.stopped(report.step)

    def finished(self) -> None:
        """What comes now may fail and be tried again: that costs no step."""
        last = self.state.plan.steps
        if self._saved != last:
            self._save(last)
        self._saver.wait()
        if self.state.chief:
            # Who is asked to stop from now on need not wait for more.
            self.state.client.stopped(last)

    def close(self) -> None:
        """A checkpoint that is under way arrives."""
        self._saver.close()

    def _save(self, step: int) -> None:
        state, engine = self.state, self.state.engine
        # First, so that no more than one state lies in memory.
        self._saver.wait()
        more = {_OWN.format(engine.rank): to_jsonl(self._own)}
        if state.chief:
            position = files.Position(step, self._identity, engine.updates)
            more |= {
                files.STATE: files.position_json(position),
                HISTORY: to_jsonl(state.history),
                SAMPLES: to_jsonl(state.samples),
            }
        state.checkpoint = self._saver.save(step, engine.fragments(), more)
        self._saved = step


def samples_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The ids of each step as far as the checkpoint goes: those of earlier groups, then those of its own ranks."""
    steps: dict[int, list[str]] = {}
    for data in checkpoint.lines(_IDS):
        for line in from_jsonl(data):
            steps.setdefault(line["step"], []).extend(line["ids"])
    before = from_jsonl(checkpoint.folder.read(SAMPLES))
    return [*before, *({"step": step, "ids": ids} for step, ids in sorted(steps.items()))]
