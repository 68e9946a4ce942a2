"""When it is time to say something again, and how a time reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from components.contract import pace
from components.contract.pace import Due, Speed, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (95.4, "95 s"), (119, "119 s"), (120, "2 min"), (3540, "59 min"), (3600, "1 h 00 min"),
     (11_100, "3 h 05 min"), (4_000_000, "1,111 h 07 min")],
)  # fmt: skip
def test_a_time_reads_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("at_once", [True, False])
def test_it_is_due_once_in_its_seconds(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now))
    due = Due(5.0, at_once)
    asked = []
    for step in range(12):
        now = 100.0 + step
        asked.append(due())
    assert [step for step, is_due in enumerate(asked) if is_due] == ([0, 5, 10] if at_once else [5, 10])


def test_what_is_left_goes_by_what_was_done_since_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now))
    speed = Speed(done=40)
    now = 110.0
    assert speed.left(40, 100) is None
    assert speed.per_second(60) == 2.0
    assert speed.left(60, 100) == "20 s"
