"""A trace of a few steps of rank 0, kept in the artifact."""

from components.training.observers.base import Observer, RunState
from components.training.profiling import Trace
from components.training.record import Entry
from llava.training.loop import StepReport

TRACE = "profile/trace.json.gz"


class Profile(Observer):
    """Records on rank 0 alone; the others have nothing to do."""

    def __init__(self, state: RunState) -> None:
        super().__init__(state)
        self._trace = Trace(state.scratch / "trace.json.gz") if state.chief else None

    def stepped(self, report: StepReport, entry: Entry) -> None:
        if self._trace is not None:
            self._trace.step()

    def finished(self) -> None:
        if self._trace is not None and (trace := self._trace.close()):
            task = self.state.task
            task.guard.check()
            task.folder.upload(trace, TRACE)
