"""Where the run is, for the person at the driver."""

from components.contract.pace import Due
from components.training.board import Progress
from components.training.observers.base import Observer, RunState
from components.training.record import Entry
from llava.training.loop import StepReport

_EVERY = 0.5
_RECENT = 20


class Show(Observer):
    """Rank 0 tells the driver, as means over the last steps."""

    def __init__(self, state: RunState) -> None:
        super().__init__(state)
        self._due = Due(_EVERY)

    def resumed(self, step: int) -> None:
        if self.state.chief and step:
            self.state.client.note(f"resuming after step {step} of {self.state.plan.steps}")

    def stepped(self, report: StepReport, entry: Entry) -> None:
        if not (self.state.chief and self._due()):
            return
        recent = self.state.history[-_RECENT:]

        def mean(name: str) -> float:
            return float(sum(one[name] for one in recent)) / len(recent)

        self.state.client.put(
            Progress(
                step=report.step,
                steps=self.state.plan.steps,
                loss=mean("train/loss"),
                samples_per_second=mean("train/samples_per_second"),
                tokens_per_second=mean("train/tokens_per_second"),
                mfu=mean("train/mfu") if "train/mfu" in entry else None,
                gpu_memory_gib=entry.get("train/gpu_memory_gib"),
            )
        )
