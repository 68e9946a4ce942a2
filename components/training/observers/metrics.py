"""Each step's metrics in MLflow, while training goes on."""

from components.contract.pace import Due
from components.training.observers.base import Observer, RunState
from components.training.record import Entry, MetricSender
from llava.training.loop import StepReport

_EVERY = 5.0


class Metrics(Observer):
    """Rank 0 sends what is new every few seconds; the driver sends the rest at the end."""

    def __init__(self, state: RunState, sender: MetricSender) -> None:
        super().__init__(state)
        self._sender, self._due = sender, Due(_EVERY)

    def stepped(self, report: StepReport, entry: Entry) -> None:
        if self.state.chief and self._due():
            self._sender.send(self.state.history)

    def close(self) -> None:
        self._sender.close()
