"""A function over many pieces on a real cluster."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from components.contract.component import Component, Job, Settings
from components.ray_cluster.spread import spread
from llava.data.images import BadImage
from llava.errors import LlavaError, RefusedInput


class Square(Component):
    """Squares numbers; the pieces may do worse things."""

    name: ClassVar[str] = "square"
    version: ClassVar[str] = "1"
    workers: int | None = None
    work: Any = None
    pieces: ClassVar[list[int]] = list(range(12))

    def run(self, job: Job) -> None:
        found = dict(spread(job, "squaring", self.work, job.folder.uri, self.pieces, self.workers))
        job.notes["squares"] = [found[number] for number in range(len(self.pieces))]


def squares(run_in: Any, work: Any, workers: int | None = None) -> list[int]:
    component = Square()
    component.work, component.workers = work, workers
    notes: dict[str, list[int]] = run_in(component, Settings()).artifact.manifest.notes
    return notes["squares"]


def slowly(place: str, piece: int) -> int:
    """Notes when it began and ended."""
    started = time.monotonic_ns()
    time.sleep(0.03)
    Path(place, f"span-{started}-{time.monotonic_ns()}").touch()
    return piece * piece


def with_accidents(place: str, piece: int) -> int:
    """The first try of two pieces fails: one store error, one death."""
    mark = Path(place, f"tried-{piece}")
    if piece in (3, 5) and not mark.exists():
        mark.touch()
        if piece == 3:
            raise OSError("the network is away")
        os.kill(os.getpid(), signal.SIGKILL)
    return piece * piece


def refusing(place: str, piece: int) -> int:
    if piece == 7:
        raise RefusedInput("seven is not for squaring")
    return piece


def failing(place: str, piece: int) -> int:
    raise BadImage("broken", f"piece {piece} does not decode")


def test_every_piece_has_its_result_and_no_more_run_at_once_than_asked(run_in: Any, tmp_path: Path) -> None:
    assert squares(run_in, slowly, workers=1) == [piece * piece for piece in range(12)]
    spans = sorted(
        tuple(map(int, file.name.split("-")[1:])) for file in (tmp_path / "root").glob("square/*/span-*")
    )
    assert len(spans) == 12
    assert all(ended <= begun for (_, ended), (begun, _) in pairwise(spans))


def test_a_store_that_fails_and_a_worker_that_dies_cost_a_second_try(run_in: Any) -> None:
    assert squares(run_in, with_accidents) == [piece * piece for piece in range(12)]


def test_a_piece_that_fails_for_good_names_the_work(run_in: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="squaring: seven is not for squaring"):
        squares(run_in, refusing)
    with pytest.raises(LlavaError, match=r"squaring: piece \d+ does not decode"):
        squares(run_in, failing)
