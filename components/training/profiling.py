"""A look inside a few steps: torch's profiler on rank 0, as a trace for chrome://tracing or Perfetto."""

from pathlib import Path

import torch
from torch import profiler

SKIPPED, RECORDED = 3, 3
"""Steps of this process that warm up, and those that the trace holds."""


class Trace:
    """Records steps `SKIPPED + 1` to `SKIPPED + RECORDED` of this process; a shorter run keeps what it has."""

    def __init__(self, target: Path):
        """`target`: the file to write, `.json.gz`."""
        self._target = target
        kinds = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(profiler.ProfilerActivity.CUDA)
        plan = profiler.schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1)
        self._profiler = profiler.profile(activities=kinds, schedule=plan, on_trace_ready=self._write)
        self._profiler.start()

    def step(self) -> None:
        """After each step."""
        self._profiler.step()

    def close(self) -> Path | None:
        """The trace's file, or None where there were too few steps."""
        self._profiler.stop()
        return self._target if self._target.exists() else None

    def _write(self, recorded: profiler.profile) -> None:
        if not self._target.exists():
            recorded.export_chrome_trace(str(self._target))
