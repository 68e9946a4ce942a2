"""A loss that jumps names the samples of its step."""

from components.training.observers.base import Observer, RunState
from components.training.record import Entry, MetricSender
from llava.training.guards import SpikeGuard
from llava.training.loop import StepReport, gathered


class Spikes(Observer):
    """Tells a person, the history and MLflow which samples made a jump."""

    def __init__(self, state: RunState, sender: MetricSender) -> None:
        super().__init__(state)
        self._sender = sender
        self._guard = SpikeGuard(state.task.settings.spike_factor)

    def resumed(self, step: int) -> None:
        losses = [entry["train/loss"] for entry in self.state.history]
        self._guard = SpikeGuard(self.state.task.settings.spike_factor, losses)

    def stepped(self, report: StepReport, entry: Entry) -> None:
        # The loss is the same on all ranks, and so is the answer: all of them tell their samples.
        if (median := self._guard.median(report.loss)) is None:
            return
        ids = [name for each in gathered(self.state.engine, report.ids) for name in each]
        entry["spike"] = {"median": median, "samples": ids}
        if self.state.chief:
            told = f"loss {report.loss:.3f}, the median is {median:.3f}; samples {', '.join(ids)}"
            self.state.client.note(f"step {report.step}: {told}")
            self._sender.tag({f"spike.step_{report.step}": told})
