"""Whatever stands in a record, a file of data, an archive, a config or an answer: one line at most, and no damage.

The normal run takes a second of each kind. `make drills` takes `LLAVA_FUZZ_SECONDS` (600) for all of them. Both print
the seed; `LLAVA_FUZZ_SEED` sets it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.fuzz_kinds import KINDS
from tests.support.fuzzing import Held, fuzz

SECONDS = 1.0


def run(kind: str, place: Path, seconds: float) -> None:
    """Inputs of one kind for so long."""
    here = place / "here"
    here.mkdir()
    inputs, readers = KINDS[kind](place)
    held, before = Held(place), Path.cwd()

    def work(found: Any) -> None:
        for reader in readers(found):
            held.run(reader)

    os.chdir(here)
    try:
        fuzz(kind, inputs, held, work, seconds=seconds)
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept beside a root stays in the test's own folder."""
    monkeypatch.setenv("LLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_of_each_kind(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, SECONDS)


@pytest.mark.drill
@pytest.mark.parametrize("kind", KINDS)
def test_minutes_of_each_kind(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, float(os.environ.get("LLAVA_FUZZ_SECONDS", "600")) / len(KINDS))
