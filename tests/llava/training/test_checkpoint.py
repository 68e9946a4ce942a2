"""A state out of the files of many ranks: read in pieces of any size, with little of them in memory."""

import math
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from llava.training import checkpoint
from llava.training.checkpoint import PARTS, Fragment, SavedState, write_share

TENSORS, PIECE = 40, 1000


def saved_by(folder: Path, world: int) -> SavedState:
    """A state of `TENSORS` tensors, of which each rank holds a piece of `PIECE` elements."""
    shares = []
    for rank in range(world):
        begin = rank * PIECE
        values = torch.arange(begin, begin + PIECE, dtype=torch.float32)
        fragments = [
            Fragment(f"tensor.{number}", begin, dict.fromkeys(PARTS, values + number))
            for number in range(TENSORS)
        ]
        shares.append(write_share(folder, rank, world, fragments))
    local = fs.LocalFileSystem()
    return SavedState(str(folder), 1, shares, lambda name: local.open_input_file(str(folder / name)))


@pytest.mark.parametrize("world", [1, 3, 64])
def test_the_files_of_many_ranks_are_read_ahead_by_little_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr(checkpoint, "_WINDOW", 64 << 10)
    monkeypatch.setattr(checkpoint, "_WINDOWS", 256 << 10)
    monkeypatch.setattr(checkpoint, "_WINDOW_AT_LEAST", 4 << 10)
    saved = saved_by(tmp_path, world)
    most = 0
    for number in range(TENSORS):
        whole = saved.whole("weights", f"tensor.{number}", torch.Size([world * PIECE]))
        assert torch.equal(whole, torch.arange(world * PIECE, dtype=torch.float32) + number)
        most = max(most, sum(len(reader._window) for reader in saved._files.values()))
    saved.close()
    # Four files take 64 KiB each, and the k-th 256 KiB / k: in all, no more than grows with the logarithm.
    assert 0 < most <= (256 << 10) * (1 + math.log(max(1, world / 4)))
