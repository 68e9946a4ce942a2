"""A loss that jumps is told with the samples of its step, also right after a run was taken up again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from components.training.observers.spikes import Spikes


def test_a_jump_names_its_samples_in_the_history_to_the_driver_and_in_mlflow() -> None:
    notes: list[str] = []
    tags: dict[str, str] = {}
    history = [{"train/loss": 1.0} for _ in range(40)]
    state: Any = SimpleNamespace(
        task=SimpleNamespace(settings=SimpleNamespace(spike_factor=3.0)),
        engine=SimpleNamespace(world=1),
        history=history,
        chief=True,
        client=SimpleNamespace(note=notes.append),
    )
    sender: Any = SimpleNamespace(tag=tags.update)
    spikes = Spikes(state, sender)
    spikes.resumed(40)
    calm: dict[str, Any] = {}
    spikes.stepped(SimpleNamespace(step=41, loss=1.1, ids=["a"]), calm)  # type: ignore[arg-type]
    jump: dict[str, Any] = {}
    spikes.stepped(SimpleNamespace(step=42, loss=9.0, ids=["b", "c"]), jump)  # type: ignore[arg-type]
    assert calm == {}
    assert jump["spike"]["samples"] == ["b", "c"] and jump["spike"]["median"] == 1.0
    assert notes == ["step 42: loss 9.000, the median is 1.000; samples b, c"]
    assert list(tags) == ["spike.step_42"]
