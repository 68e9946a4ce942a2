"""Which samples make a step, and where they are computed."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.order import WINDOW, epoch_order, times_seen
from llava.data.placement import FILLER, balance, homes, pack
from llava.data.plan import BatchPlan, SampleIndex
from llava.training.schedule import cosine_with_warmup

GROUPS = [group for group in range(20) for _ in range(7)]
ONCE = np.ones(len(GROUPS), dtype=np.int64)


def index_of(
    groups: list[int], tokens: np.ndarray | None = None, images: np.ndarray | None = None
) -> SampleIndex:
    count = len(groups)
    ones = np.ones(count, dtype=np.int64)
    tokens = 10 * ones if tokens is None else tokens
    return SampleIndex(
        np.array(groups), np.arange(count), 0 * ones, tokens, ones, ones if images is None else images
    )


def stage_2(row_groups: int, image_tokens: int, rows: int = 256) -> SampleIndex:
    """Lengths as in stage 2: several turns of 50 to 600 text tokens with a long tail, mostly with one image."""
    random = np.random.default_rng(5)
    count = row_groups * rows
    text = np.clip(np.exp(random.normal(np.log(160), 0.7, count)), 50, 600).astype(np.int64)
    tail = random.random(count) < 0.03
    text[tail] = random.integers(600, 1400, tail.sum())
    images = (random.random(count) < 0.93).astype(np.int64)
    images[random.random(count) < 0.01] = 2
    groups = np.repeat(np.arange(row_groups), rows).tolist()
    return index_of(groups, text + images * image_tokens, images)


def test_every_epoch_holds_every_sample_once() -> None:
    plan = BatchPlan(index_of(GROUPS), seed=1, epochs=3, global_batch=16)
    for epoch in range(3):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.samples(first + step) for step in range(plan.steps_per_epoch)])
        assert sorted(seen) == list(range(len(GROUPS)))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    np.random.seed(5)
    one = epoch_order(np.array(GROUPS), ONCE, seed=1, epoch=0).order
    np.random.seed(6)
    assert (one == epoch_order(np.array(GROUPS), ONCE, seed=1, epoch=0).order).all()
    assert (one != epoch_order(np.array(GROUPS), ONCE, seed=1, epoch=1).order).any()
    assert (one != epoch_order(np.array(GROUPS), ONCE, seed=2, epoch=0).order).any()


def test_samples_stay_within_a_window_of_row_groups_and_spread_over_it() -> None:
    groups = np.array(GROUPS)
    epoch = epoch_order(groups, ONCE, seed=3, epoch=0, window=4)
    assert (np.diff(epoch.edges) == 4 * 7).all()
    for start in epoch.edges[:-1]:
        inside = groups[epoch.order[start : start + 4 * 7]]
        assert len(set(inside)) == 4
        # In each half of the window there is about half of each group, in no fixed order.
        halves = [np.unique(half, return_counts=True)[1] for half in np.split(inside, 2)]
        assert all(3 <= count <= 4 for half in halves for count in half)
    firsts = [tuple(np.argsort(groups[epoch.order[start : start + 4]])) for start in epoch.edges[:-1]]
    assert len(set(firsts)) > 1


def test_a_plan_can_start_at_any_step() -> None:
    whole = BatchPlan(index_of(GROUPS), seed=1, epochs=2, global_batch=16)
    later = BatchPlan(index_of(GROUPS), seed=1, epochs=2, global_batch=16)
    assert (later.samples(13) == [whole.samples(step) for step in range(14)][13]).all()
    assert later.place(13, 3, 100) == [whole.place(step, 3, 100) for step in range(14)][13]


def test_a_weight_says_how_often_a_sample_is_seen_in_an_epoch() -> None:
    groups = np.repeat([0, 1, 2, 3], 10)
    weights = np.array([1.0, 1.0, 2.5, 0.3])
    plan = BatchPlan(index_of(groups.tolist()), seed=4, epochs=10, global_batch=8, weights=weights)
    assert plan.steps_per_epoch == -(-(10 + 10 + 25 + 3) // 8)
    total = np.zeros(40, dtype=np.int64)
    for epoch in range(10):
        first = epoch * plan.steps_per_epoch
        seen = np.concatenate([plan.samples(first + step) for step in range(plan.steps_per_epoch)])
        counts = np.bincount(seen, minlength=40)
        assert set(counts[:20]) == {1}
        assert set(counts[20:30]) == {2, 3}
        assert counts[30:].sum() == 3
        total += counts
    # Over ten epochs the fractions have gone round: nobody was drawn more often than another.
    assert set(total[:20]) == {10}
    assert set(total[20:30]) == {25}
    assert set(total[30:]) == {3}
    again = times_seen(groups, weights, seed=4, epoch=6)
    assert (again == times_seen(groups, weights, seed=4, epoch=6)).all()
    assert (again != times_seen(groups, weights, seed=5, epoch=6)).any()


@settings(max_examples=200, deadline=None)
@given(
    samples=st.lists(
        st.tuples(st.integers(1, 900), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=60
    ),
    ranks=st.integers(1, 8),
    budget=st.integers(200, 2000),
)
def test_each_sample_is_placed_once_in_equally_many_rows_within_the_budget(
    samples: list[tuple[int, int, int]], ranks: int, budget: int
) -> None:
    tokens, images, groups = (np.array(column) for column in zip(*samples, strict=True))
    at_home = homes(np.bincount(groups, tokens, minlength=10).tolist(), ranks)
    where = balance(tokens.tolist(), [at_home[group] for group in groups], ranks)
    members = [[one for one in range(len(tokens)) if where[one] == rank] for rank in range(ranks)]
    placed = pack(tokens, images, members, budget)
    assert len({len(rows) for rows in placed}) == 1
    for rows, mine in zip(placed, members, strict=True):
        assert sorted(position for row in rows for position in row) == mine
        for row in rows:
            filler = 0 if any(images[row]) else FILLER
            assert len(row) <= 1 or tokens[row].sum() + filler <= budget


def test_every_row_gets_an_image_while_there_are_enough() -> None:
    tokens, images = np.full(40, 100), np.array([1] * 8 + [0] * 32)
    (rows,) = pack(tokens, images, [list(range(40))], 520)
    assert len(rows) == 8
    assert all(sum(images[row]) == 1 for row in rows)


@pytest.mark.parametrize("image_tokens", [256, 576])
def test_rows_are_full_and_ranks_even_at_the_recipes_batch(image_tokens: int) -> None:
    index, image_cost = stage_2(4, image_tokens), 20.0
    print(
        f"\nfill of the worst rank, and the mean rank's work over the heaviest's ({image_tokens} per image)"
    )
    for ranks in range(1, 9):
        plan = BatchPlan(index, seed=2, epochs=1, global_batch=128, image_cost=image_cost)
        useful, computed = np.zeros(ranks), np.zeros(ranks)
        evenness = []
        for step in range(plan.steps_per_epoch):
            chosen = plan.samples(step)
            tokens, images = index.tokens[chosen], index.images[chosen]
            placed = plan.place(step, ranks, 4096)
            work = [
                sum(tokens[row].sum() + image_cost * images[row].sum() for row in rows) for rows in placed
            ]
            evenness.append(np.mean(work) / max(work))
            for rank, rows in enumerate(placed):
                useful[rank] += sum(tokens[row].sum() for row in rows)
                computed[rank] += sum(tokens[row].sum() + FILLER * (not any(images[row])) for row in rows)
        fill = (useful / computed).min()
        print(f"  {ranks} ranks: {fill:.4f}, even {np.mean(evenness):.3f} (worst step {min(evenness):.3f})")
        assert fill >= 0.95
        assert np.mean(evenness) >= 0.95


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_few_row_groups_are_read_by_more_than_one_rank(ranks: int) -> None:
    """Bytes read over bytes needed, if all row groups have the same size; each is read once a window and rank."""
    index = stage_2(2 * WINDOW, 576)
    plan = BatchPlan(index, seed=2, epochs=1, global_batch=128, image_cost=20.0)
    held: list[set[int]] = [set() for _ in range(ranks)]
    read = 0
    for step in range(plan.steps_per_epoch):
        chosen, opened = plan.samples(step), plan.open_groups(step)
        for rank, rows in enumerate(plan.place(step, ranks, 4096)):
            wanted = {int(index.group[chosen[position]]) for row in rows for position in row}
            assert wanted <= opened
            read += len(wanted - held[rank])
            held[rank] = (held[rank] | wanted) & opened
    print(f"\n  {ranks} ranks: {read / (2 * WINDOW):.2f} times the bytes needed")
    assert read / (2 * WINDOW) <= 1.5


def test_ranks_without_samples_still_have_their_rows() -> None:
    plan = BatchPlan(index_of([0, 0, 0]), seed=0, epochs=1, global_batch=3)
    placed = plan.place(0, 5, 100)
    assert sorted(len(row) for rows in placed for row in rows) == [0, 0, 1, 1, 1]


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [cosine_with_warmup(step, 100, 1e-3, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rates[3] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert 0 < rates[-1] < 1e-6
