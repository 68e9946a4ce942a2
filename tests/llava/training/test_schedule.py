"""The learning rate over the steps, beside that of transformers."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from llava.training.loop import Schedule
from llava.training.schedule import cosine_with_warmup


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.03), (7, 0.03), (100, 0.03), (100, 0), (5198, 0.03)])
def test_a_warm_up_from_zero_is_that_of_the_trainer_of_transformers(total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    stock = get_cosine_schedule_with_warmup(optimizer, math.ceil(total * ratio), total)
    for step in range(total):
        assert cosine_with_warmup(step, total, 1e-3, ratio, from_zero=True) == pytest.approx(
            stock.get_last_lr()[0]
        )
        optimizer.step()
        stock.step()


@pytest.mark.parametrize("total", [7, 100, 5198])
def test_otherwise_the_warm_up_is_one_update_ahead_and_the_rest_is_the_same(total: int) -> None:
    warmup = math.ceil(total * 0.03)
    ahead, trainer = (Schedule(total, 1e-3, 0.03, warmup_from_zero=zero) for zero in (False, True))
    assert [ahead.rate(step) for step in range(warmup)] == [trainer.rate(step + 1) for step in range(warmup)]
    assert [ahead.rate(step) for step in range(warmup, total)] == [
        trainer.rate(step) for step in range(warmup, total)
    ]
    assert ahead.rate(0) > 0 == trainer.rate(0)
