"""Each step's metrics reach MLflow in a thread, whatever the loop notes in the meantime."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from components.training.observers.metrics import Metrics
from components.training.record import Entry, MetricSender


class SlowRun:
    """Keeps what it is sent; its first answer waits until `answer` is set."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.rows: list[tuple[str, float, int, int]] = []

    def tags(self, values: Mapping[str, str]) -> None:
        assert self.answer.wait(30)

    def steps(self, name: str) -> set[int]:
        return set()

    def metric_rows(self, rows: Sequence[tuple[str, float, int, int]]) -> None:
        self.rows += rows


def observer(rank: int) -> tuple[Metrics, SlowRun, list[Entry]]:
    run: Any = SlowRun()
    state: Any = SimpleNamespace(chief=rank == 0, history=[{"step": 1, "train/loss": 0.5, "at": 1.0}])
    sender = MetricSender(run)
    # The thread is busy, as it is while MLflow takes its time.
    sender.tag({})
    return Metrics(state, sender), run, state.history


def stepped(metrics: Metrics) -> None:
    report: Any = SimpleNamespace()
    metrics.stepped(report, {})


def test_a_line_that_is_only_begun_keeps_none_from_mlflow() -> None:
    metrics, run, history = observer(rank=0)
    stepped(metrics)
    history.append({})
    run.answer.set()
    metrics.close()
    assert run.rows == [("train/loss", 0.5, 1, 1000)]


@pytest.mark.parametrize(("rank", "sent"), [(0, 1), (1, 0)])
def test_rank_0_sends_now_and_then_and_the_others_never(rank: int, sent: int) -> None:
    metrics, run, history = observer(rank)
    run.answer.set()
    stepped(metrics)
    history.append({"step": 2, "train/loss": 0.4, "at": 2.0})
    stepped(metrics)
    metrics.close()
    assert len(run.rows) == sent
