"""What a run leaves behind step by step: the history, which samples made each step, and the metrics in MLflow."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from components.contract import Artifact, TrackedRun, TrackingError
from llava.data.jsonl import from_jsonl

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints (`components/training/checkpoints.py`), which goes when the artifact is finished."""
HISTORY = "history.jsonl"
"""A line per step: its metrics, when it was (`at`, seconds since 1970) and, after a jump of the loss, `spike`."""
SAMPLES = "samples.jsonl"
"""A line per step: the ids that made its global batch."""

Entry = dict[str, Any]


class MetricLog:
    """Each step's metrics into an MLflow run exactly once, whatever was killed in between.

    What the run holds is read back first, per metric, so that neither a step that was logged before a crash and
    computed again after it is logged twice, nor one that was computed and not logged is left out.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._held: dict[str, set[int]] = {}
        self._sent = 0
        self._lock = threading.Lock()

    def send(self, history: Sequence[Entry]) -> None:
        """Log what of `history` is not logged yet. While MLflow is away nothing is lost: call again later."""
        with self._lock:
            rows = []
            upto = len(history)
            try:
                for entry in history[self._sent : upto]:
                    step, when = int(entry["step"]), int(entry["at"] * 1000)
                    rows += [
                        (name, float(value), step, when)
                        for name, value in metrics(entry).items()
                        if step not in self._steps(name)
                    ]
            except TrackingError:
                return
            self._run.metric_rows(rows)
            self._sent = upto

    def _steps(self, name: str) -> set[int]:
        if name not in self._held:
            self._held[name] = self._run.steps(name)
        return self._held[name]


def curves(stage: str, artifact: Artifact) -> list[tuple[str, float, int, int]]:
    """The losses of a finished stage, such as `finetune/loss`, as MLflow's rows: name, value, step, milliseconds.

    A workflow logs them in its own run, so that two workflows can be compared by their curves. Empty for a stage that
    trained nothing.
    """
    if artifact.folder.stat(HISTORY) is None:
        return []
    return [
        (f"{stage}/{name.removeprefix('train/')}", float(value), int(entry["step"]), int(entry["at"] * 1000))
        for entry in from_jsonl(artifact.read(HISTORY))
        for name, value in metrics(entry).items()
        if name.endswith("/loss")
    ]


class MetricSender:
    """Talks to MLflow in a thread, so that training never waits for it."""

    def __init__(self, run: TrackedRun) -> None:
        self._run, self._log = run, MetricLog(run)
        self._pool = ThreadPoolExecutor(1, "mlflow")
        self._pending: Future[None] | None = None

    def send(self, history: Sequence[Entry]) -> None:
        """Log what is new in `history` as it is now, unless an earlier call is still at it."""
        if self._pending is None or self._pending.done():
            # A copy: the loop begins further lines while the thread reads.
            self._pending = self._pool.submit(self._log.send, list(history))

    def tag(self, values: Mapping[str, str]) -> None:
        """Set tags; where MLflow is away they are left out, the history has what they say."""
        self._pool.submit(self._tag, values)

    def close(self) -> None:
        """Until everything that was asked for was tried."""
        self._pool.shutdown(wait=True)

    def _tag(self, values: Mapping[str, str]) -> None:
        try:
            self._run.tags(values)
        except TrackingError:
            return


def metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """What of a history line is a metric."""
    return {name: value for name, value in entry.items() if "/" in name}
