"""What ranks tell each other in a step arrives as it was said, however many say it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from llava.training.engine import AdamW, PlainEngine
from llava.training.loop import Schedule, StepReport, any_of, told, train
from tests.support.mixed_batches import pieces, write_mixed
from tests.support.process_group import run_group
from tests.support.tiny_llava import tiny_llava

ASK, STOP = 1, 2


def heard(model: Path, data: Path, said: dict[int, list[int]]) -> list[int]:
    """What this rank hears in each of three steps, in which the ranks say `said`."""
    run = pieces(model, data, 1, 700)
    engine = PlainEngine(run.module, AdamW(), gradient_clipping=1.0)
    words: list[int] = []
    own = iter(said[engine.rank])

    def after(report: StepReport) -> bool:
        words.append(report.word)
        return False

    train(engine, run.collator, Schedule(3, 1e-3, 0.1), 0, after, lambda: next(own))
    return words


@pytest.mark.parametrize("workers", [2, 4])
def test_two_that_ask_do_not_say_stop(tmp_path: Path, workers: int) -> None:
    model, data = tiny_llava(tmp_path / "model"), write_mixed(tmp_path / "data.parquet")
    # Step 1: all ask. Step 2: one says stop. Step 3: one asks while another says stop.
    said = {rank: [ASK, 0, 0] for rank in range(workers)}
    said[1] = [ASK, STOP, STOP]
    said[0] = [ASK, 0, ASK]
    for words in run_group(heard, workers, model, data, said):
        assert words == [ASK, STOP, ASK | STOP]


def agreed(world: int) -> list[Any]:
    """What this rank hears of rank 0, and of a thing that is true nowhere, somewhere, everywhere."""
    rank = distributed.get_rank()
    engine: Any = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
    return [
        told(engine, {"from": rank}),
        any_of(engine, False),
        any_of(engine, rank == world - 1),
        any_of(engine, True),
    ]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_ranks_hear_rank_0_and_what_is_true_on_any(workers: int) -> None:
    assert run_group(agreed, workers, workers) == [[{"from": 0}, False, True, True]] * workers
