"""Leaving early: what rank 0 hears becomes one step after which all ranks leave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import train

from components.training.observers.stopping import ASK, STOP, Stopping


def stopping(rank: int, stop: bool = False, notes: list[str] | None = None) -> Stopping:
    client = SimpleNamespace(stopping=lambda: stop, note=(notes if notes is not None else []).append)
    state: Any = SimpleNamespace(chief=rank == 0, client=client, stopped=False)
    return Stopping(state)


def report(word: int) -> Any:
    return SimpleNamespace(step=3, word=word)


def test_rank_0_asks_now_and_then_and_says_stop_once_it_heard_so() -> None:
    calm, told, other = stopping(0), stopping(0, stop=True), stopping(1, stop=True)
    try:
        assert [calm.word() for _ in range(3)] == [ASK, 0, 0]
        assert told._listener is not None and told._listener.stop.wait(5)
        assert told.word() == STOP
        assert other.word() == 0
    finally:
        for one in (calm, told, other):
            one.close()


@pytest.mark.parametrize(
    ("word", "taken", "leaves"),
    [
        (0, True, False),
        (ASK, False, False),
        (ASK, True, True),
        (STOP, False, True),
        (ASK | STOP, False, True),
    ],
)
def test_a_step_is_the_last_where_somebody_said_stop_or_a_node_is_taken_away(
    word: int, taken: bool, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    info = SimpleNamespace(preempted_node_ids=["abc"]) if taken else None
    monkeypatch.setattr(train, "get_preemption_info", lambda: info, raising=False)
    one = stopping(0, notes=notes)
    try:
        one.leaving(report(word))
    finally:
        one.close()
    assert one.state.stopped is leaves
    assert notes == (["nodes are being taken away: abc"] if word == ASK and taken else [])
