"""A trace of a few steps goes into the artifact, as long as the artifact is this run's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components.contract import LeaseLost, acquire, open_store
from components.training.observers.profile import TRACE, Profile


def profile(folder: Any, guard: Any, scratch: Path, rank: int = 0) -> Profile:
    state: Any = SimpleNamespace(
        chief=rank == 0, scratch=scratch, task=SimpleNamespace(folder=folder, guard=guard)
    )
    made = Profile(state)
    for _ in range(7):
        torch.ones(2, 2) @ torch.ones(2, 2)
        made.stepped(SimpleNamespace(), {})  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_keeps_a_trace(tmp_path: Path, rank: int) -> None:
    folder = open_store(tmp_path / "root").sub("finetune/0123")
    with acquire(folder) as lease:
        profile(folder, lease.guard, tmp_path, rank).finished()
    assert (folder.stat(TRACE) is not None) == (rank == 0)
    if rank == 0:
        names = {
            event.get("name") for event in json.loads(gzip.decompress(folder.read(TRACE)))["traceEvents"]
        }
        assert {f"ProfilerStep#{step}" for step in (3, 4, 5)} <= names


def test_a_run_that_lost_its_artifact_leaves_no_trace_in_it(tmp_path: Path) -> None:
    folder = open_store(tmp_path / "root").sub("finetune/0123")
    with acquire(folder) as lease:
        made = profile(folder, lease.guard, tmp_path)
        lease.release()
        with pytest.raises(LeaseLost):
            made.finished()
    assert folder.stat(TRACE) is None
