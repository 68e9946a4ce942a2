"""The line of each step in the history."""

import time

import torch

from components.training.observers.base import Observer, RunState
from components.training.record import Entry
from components.training.utilisation import Utilisation
from llava.training.loop import StepReport


class Record(Observer):
    """Fills each line with what the step showed; it comes first, so that the others can read it."""

    def __init__(self, state: RunState, utilisation: Utilisation | None) -> None:
        super().__init__(state)
        self._utilisation = utilisation

    def stepped(self, report: StepReport, entry: Entry) -> None:
        engine, seconds = self.state.engine, report.seconds
        entry |= {
            "step": report.step,
            "train/loss": report.loss,
            "train/learning_rate": report.learning_rate,
            "train/grad_norm": report.grad_norm,
            "train/samples_per_second": report.samples / seconds,
            "train/tokens_per_second": report.tokens / seconds,
            "train/supervised_tokens": report.supervised,
            "train/fill": report.fill,
            "train/data_wait": report.data_wait / seconds,
            "at": time.time(),
        }
        if self._utilisation is not None:
            mfu = self._utilisation.mfu(report.tokens, report.supervised, seconds, engine.world)
            entry["train/mfu"] = mfu
        if engine.device.type == "cuda":
            entry["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(engine.device) / 2**30
