"""Which samples make a step, and where they are computed."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.plan import Plan, SampleIndex, assign, epoch_order
from llava.training.schedule import cosine_with_warmup


def index_of(groups: list[int]) -> SampleIndex:
    count = len(groups)
    ones = np.ones(count, dtype=np.int64)
    return SampleIndex(np.array(groups), np.arange(count), 0 * ones, 10 * ones, ones, ones)


GROUPS = [group for group in range(20) for _ in range(7)]


def test_every_epoch_holds_every_sample_once() -> None:
    plan = Plan(index_of(GROUPS), seed=1, epochs=3, global_batch=16)
    for epoch in range(3):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.samples(first + step) for step in range(plan.steps_per_epoch)])
        assert sorted(seen) == list(range(len(GROUPS)))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    np.random.seed(5)
    one = epoch_order(np.array(GROUPS), seed=1, epoch=0)
    np.random.seed(6)
    assert (one == epoch_order(np.array(GROUPS), seed=1, epoch=0)).all()
    assert (one != epoch_order(np.array(GROUPS), seed=1, epoch=1)).any()
    assert (one != epoch_order(np.array(GROUPS), seed=2, epoch=0)).any()


def test_samples_stay_within_a_window_of_row_groups() -> None:
    groups = np.array(GROUPS)
    order = epoch_order(groups, seed=3, epoch=0, window=4)
    for start in range(0, len(order), 4 * 7):
        assert len(set(groups[order[start : start + 4 * 7]])) <= 4


def test_a_plan_can_start_at_any_step() -> None:
    whole = Plan(index_of(GROUPS), seed=1, epochs=2, global_batch=16)
    later = Plan(index_of(GROUPS), seed=1, epochs=2, global_batch=16)
    assert (later.samples(13) == [whole.samples(step) for step in range(14)][13]).all()


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 900), min_size=1, max_size=60),
    ranks=st.integers(1, 8),
    budget=st.integers(200, 2000),
)
def test_assignment_places_each_sample_once_in_equally_many_rows(
    tokens: list[int], ranks: int, budget: int
) -> None:
    lengths = np.array(tokens)
    placed = assign(lengths, ranks, budget)
    assert len(placed) == ranks
    assert len({len(rows) for rows in placed}) == 1
    everywhere = sorted(position for rows in placed for row in rows for position in row)
    assert everywhere == list(range(len(tokens)))
    for rows in placed:
        for row in rows:
            assert len(row) <= 1 or lengths[row].sum() <= budget


def test_ranks_get_nearly_equal_work() -> None:
    lengths = np.random.default_rng(0).integers(50, 600, size=256)
    loads = [sum(lengths[row].sum() for row in rows) for rows in assign(lengths, 8, 4096)]
    assert max(loads) / min(loads) < 1.02


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [cosine_with_warmup(step, 100, 1e-3, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[3] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert 0 < rates[-1] < 1e-6
