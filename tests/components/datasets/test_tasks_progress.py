"""What `run_shards` says about its progress, by a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from components.contract import pace
from components.datasets.tasks import ShardTask, _Progress


@pytest.mark.parametrize("found", [0, 4])
def test_the_time_left_comes_from_what_this_run_made_and_not_from_what_it_found(
    found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = 1000.0, list[str]()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now))
    tasks = [ShardTask(f"part-{number}", number, 100, lambda *_: None, None) for number in range(10)]
    job: Any = SimpleNamespace(say=said.append)
    progress = _Progress(job, tasks, tasks[found:])
    waiting = iter(tasks[found:])

    def after(seconds: float, finished: int) -> str:
        nonlocal now
        now = 1000.0 + seconds
        for _ in range(finished):
            progress.finished(next(waiting))
        lines = len(said)
        progress.say_sometimes()
        return said[-1] if len(said) > lines else ""

    told = f"{found * 100} of 1,000 samples, {found} of 10 shards"
    assert said == ["1,000 samples in 10 shards" + (", 4 found finished" if found else "")]
    assert after(4.9, 0) == ""
    assert after(5.0, 0) == told, "no pace yet"
    made = found + 2
    told = f"{made * 100} of 1,000 samples, {made} of 10 shards"
    assert after(9.0, 2) == ""
    assert after(20.0, 0) == f"{told}, 10 a second, about {100 - made * 10} s left"
    assert after(400.0, 0).endswith(f"about {(10 - made) * 200 / 60:.0f} min left")
    assert after(500.0, 10 - made) == "", "nothing is left to wait for"
