"""The loss on held-out samples, every few steps and after the last one."""

from collections.abc import Callable

from components.training.observers.base import Observer, RunState
from components.training.record import Entry
from llava.training.loop import StepReport

HELDOUT_LOSS = "eval/heldout/loss"


class HeldOutLoss(Observer):
    """Computes it on all ranks together."""

    def __init__(self, state: RunState, loss: Callable[[], float]) -> None:
        super().__init__(state)
        self._loss = loss

    def stepped(self, report: StepReport, entry: Entry) -> None:
        state = self.state
        if report.step % state.task.settings.eval_every and report.step != state.plan.steps:
            return
        loss = self._loss()
        entry[HELDOUT_LOSS] = loss
        if state.chief:
            state.client.note(f"step {report.step}: held-out loss {loss:.3f}")
