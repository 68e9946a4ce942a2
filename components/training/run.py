"""One training run on one rank: go on from the newest checkpoint, let the observers see each step, write the model."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from components.contract import Folder, TrackedRun
from components.training.checkpoints import Checkpoint, Damaged, looked_at, newest_whole
from components.training.model_files import ModelFiles
from components.training.observers.base import Observer, RunState
from components.training.observers.heldout import HeldOutLoss
from components.training.observers.metrics import Metrics
from components.training.observers.profile import Profile
from components.training.observers.record import Record
from components.training.observers.saving import Saving, samples_of
from components.training.observers.show import Show
from components.training.observers.spikes import Spikes
from components.training.observers.stopping import Stopping
from components.training.record import HISTORY, SAMPLES, Entry, MetricSender
from components.training.utilisation import Utilisation
from llava.data.jsonl import from_jsonl, to_jsonl
from llava.learned import Learned
from llava.training.loop import StepReport, any_of


class Run:
    """What the loop calls between steps, and what happens before the first and after the last of them."""

    def __init__(self, state: RunState, identity: dict[str, Any], observers: Sequence[Observer]) -> None:
        """`identity`: what a checkpoint must agree with to be gone on from."""
        self.state, self.identity, self.observers = state, identity, observers

    def resume(self) -> int:
        """Continue from the newest checkpoint that is whole; returns the steps done."""
        state, step = self.state, 0
        if state.chief:
            state.folders.clean()
        found = newest_whole(state.folders, state.engine, state.client.note)
        if found is not None:
            position = found.position(self.identity)
            with contextlib.closing(found.state(position)) as saved:
                state.engine.restore(saved)
            state.history[:] = from_jsonl(found.folder.read(HISTORY))
            if state.chief:
                state.samples[:] = samples_of(found)
            step = position.step
            state.checkpoint = found.folder
        for one in self.observers:
            one.resumed(step)
        return step

    def word(self) -> int:
        """What this rank tells the others in the step that is under way."""
        said = 0
        for one in self.observers:
            said |= one.word()
        return said

    def after_step(self, report: StepReport) -> bool:
        """Let all see the step; True to leave early, on all ranks alike."""
        entry: Entry = {}
        self.state.history.append(entry)
        for one in self.observers:
            one.stepped(report, entry)
        if report.step < self.state.plan.steps:
            for one in self.observers:
                one.leaving(report)
        return self.state.stopped

    def finish(self, source: Path) -> None:
        """Write the model and the record. `source`: the folder of the model that training began with.

        The model is made of the checkpoint after the last step, by all ranks, each some of its files. A group that
        starts again after a failure here trains nothing: it goes on with the files that are not there yet.
        """
        for one in self.observers:
            one.finished()
        state, settings = self.state, self.state.task.settings
        # Rank 0 has committed it when it comes here.
        self._meet()
        assert state.checkpoint is not None
        last = self._checked(state.checkpoint)
        with contextlib.closing(last.state(last.position(self.identity))) as saved:
            learned = Learned(
                source,
                saved.names,
                partial(saved.whole, "weights"),
                torch.bfloat16 if settings.precision == "bf16" else torch.float32,
                settings.adapters() if state.task.training == "lora" else None,
            )
            model = ModelFiles(state.task.folder, state.task.guard, last.folder, state.scratch)
            for file in learned.files[state.engine.rank :: state.engine.world]:
                model.store(file.name, partial(learned.write, file))
        self._meet()
        if not state.chief:
            return
        model.store_rest(partial(learned.write_rest, fit=settings.image_fit, template=settings.template))
        state.task.folder.write(SAMPLES, to_jsonl(samples_of(last)))
        # Last: who finds the history finds all.
        state.task.folder.write(HISTORY, to_jsonl(state.history))

    def _checked(self, folder: Folder) -> Checkpoint:
        """The checkpoint, if it is what was committed. Else the group starts again, from the one before."""
        found, problem = looked_at(folder, self.state.engine)
        if any_of(self.state.engine, problem is not None) or found is None:
            raise Damaged(
                f"checkpoint {folder.uri}, just before the export: {problem or 'another rank found it damaged'}"
            )
        return found

    def close(self) -> None:
        """However the run ends."""
        for one in self.observers:
            one.close()

    def _meet(self) -> None:
        """Wait until all ranks have come here."""
        any_of(self.state.engine, False)


def observers_of(
    state: RunState,
    identity: dict[str, Any],
    utilisation: Utilisation | None,
    heldout: Callable[[], float] | None,
) -> list[Observer]:
    """The observers of a run, in their order: who fills the history first, who saves it last."""
    sender = MetricSender(TrackedRun.attach(state.task.tracking_uri, state.task.mlflow_run_id))
    found: list[Observer] = [Record(state, utilisation), Spikes(state, sender)]
    if heldout is not None:
        found.append(HeldOutLoss(state, heldout))
    found += [Show(state), Metrics(state, sender)]
    if state.task.settings.profile:
        found.append(Profile(state))
    return [*found, Stopping(state), Saving(state, identity)]
