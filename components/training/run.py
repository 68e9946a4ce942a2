"""One training run on one rank: go on from the newest checkpoint, let the observers see each step, write the model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ray.train import get_context
from torch import distributed, nn

from components.contract import Folder, TrackedRun
from components.training import checkpoints
from components.training.data import MODEL
from components.training.observers.base import Observer, RunState
from components.training.observers.heldout import HeldOutLoss
from components.training.observers.metrics import Metrics
from components.training.observers.profile import Profile
from components.training.observers.record import Record
from components.training.observers.saving import Saving
from components.training.observers.show import Show
from components.training.observers.spikes import Spikes
from components.training.observers.stopping import Stopping
from components.training.record import HISTORY, SAMPLES, Entry, MetricSender
from components.training.utilisation import Utilisation
from llava import lora
from llava import model as models
from llava.data.jsonl import from_jsonl, to_jsonl
from llava.training import checkpoint as files
from llava.training.loop import StepReport


class Run:
    """What the loop calls between steps, and what happens before the first and after the last of them."""

    def __init__(self, state: RunState, identity: dict[str, Any], observers: Sequence[Observer]) -> None:
        """`identity`: what a checkpoint must agree with to be gone on from."""
        self.state, self.identity, self.observers = state, identity, observers

    def resume(self) -> int:
        """Continue from the newest committed checkpoint; returns the steps done."""
        state, step = self.state, 0
        found = self._agree(lambda: checkpoints.newest([state.task.folder, *state.task.earlier]))
        if found is not None:
            first = get_context().get_local_rank() == 0
            with checkpoints.fetched(found, first, self._barrier) as local:
                saved, position = files.read(local, self.identity)
                state.engine.restore(saved)
                state.history[:] = from_jsonl((local / HISTORY).read_bytes())
                state.samples[:] = from_jsonl((local / SAMPLES).read_bytes())
            step = position.step
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
        """Write the model and the record. `source`: the folder of the model that training began with."""
        for one in self.observers:
            one.finished()
        state = self.state
        trained = state.engine.state()
        if not state.chief or trained is None:
            return
        weights = trained.weights
        del trained
        target = state.scratch / MODEL
        _write_model(source, weights, state, target)
        state.task.guard.check()
        for path in sorted(target.iterdir()):
            state.task.folder.upload(path, f"{MODEL}/{path.name}")
        state.task.folder.write(SAMPLES, to_jsonl(state.samples))
        # Last: who finds the history finds all.
        state.task.folder.write(HISTORY, to_jsonl(state.history))

    def close(self) -> None:
        """However the run ends."""
        for one in self.observers:
            one.close()

    def _barrier(self) -> None:
        if self.state.engine.world > 1:
            distributed.barrier()

    def _agree(self, choose: Callable[[], Folder | None]) -> Folder | None:
        """What rank 0 finds, on every rank: a listing may change between two looks."""
        if self.state.engine.world == 1:
            return choose()
        box = [choose() if self.state.chief else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]


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


def _write_model(source: Path, weights: dict[str, torch.Tensor], state: RunState, target: Path) -> None:
    """The stock folder with what was learned, adapters merged, in the precision of training."""
    settings = state.task.settings
    stock = models.load(source, torch.float32)
    if settings.lora:
        lora.inject(stock, settings.adapters(), settings.seed)
    own = dict(stock.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    if settings.lora:
        lora.merge(stock)
    if settings.precision == "bf16":
        module: nn.Module = stock
        module.to(dtype=torch.bfloat16)
    models.save(stock, models.load_processor(source, settings.image_fit), target, settings.template)
