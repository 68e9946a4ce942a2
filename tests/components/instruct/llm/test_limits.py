"""The pace as arithmetic on a clock of the test's own: whatever the endpoint takes, no minute holds too much."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from components.instruct.llm.limits import Budget, Limits, Pace, Tokens


def leave(pace: Pace, count: int, tokens: list[int], used: list[float]) -> list[tuple[float, int]]:
    """(when, tokens really used) of requests that leave as soon as the pace allows."""
    now, left = 1000.0, []
    for number in range(count):
        most = tokens[number % len(tokens)]
        while wait := pace.wait(now, most):
            now += wait
        pace.leave(now, number, most)
        actual = int(most * used[number % len(used)])
        pace.correct(number, actual)
        left.append((now, actual))
    return left


@settings(max_examples=60, deadline=None)
@given(
    per_minute=st.integers(1, 400),
    delays=st.lists(st.floats(0, 1.99), min_size=1, max_size=7),
    early=st.booleans(),
)
def test_no_minute_holds_more_requests_than_the_limit_wherever_they_are_counted(
    per_minute: int, delays: list[float], early: bool
) -> None:
    """Counted at the endpoint, where each arrives up to two seconds late, also with one sent just before the start."""
    pace = Pace(per_minute, None, now=1000.0)
    times = [when for when, _ in leave(pace, per_minute * 2 + 5, [1], [1.0])]
    arrived = sorted(when + delays[number % len(delays)] for number, when in enumerate(times))
    arrived = [1000.0, *arrived] if early else arrived
    for first, beyond in zip(arrived, arrived[per_minute:], strict=False):
        assert beyond - first >= 60 - 1e-6


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(100, 900), min_size=1, max_size=5),
    used=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=5),
)
def test_no_minute_holds_more_tokens_than_the_limit(tokens: list[int], used: list[float]) -> None:
    left = leave(Pace(None, 2000, now=1000.0), 40, tokens, used)
    for start, _ in left:
        assert sum(amount for when, amount in left if start <= when < start + 60) <= 2000
    assert left[-1][0] < 1000 + 62 * 41


def test_tokens_that_were_reserved_and_not_used_are_given_back() -> None:
    spared = leave(Pace(None, 1000, now=1000.0), 11, [500], [0.2])
    assert spared[5][0] == 1000.0
    assert spared[9][0] > 1060


def test_a_budget_is_never_passed_and_waits_for_what_is_under_way() -> None:
    async def run() -> None:
        limits = Limits(Pace(None, None, 0.0), Budget(tokens=1000), spent=Tokens(100, 100))
        tickets = [await limits.admit(0, Tokens(200, 200)) for _ in range(2)]
        third = asyncio.create_task(limits.admit(0, Tokens(200, 200)))
        await asyncio.sleep(0.01)
        assert not third.done()
        await limits.settle(tickets[0] or 0, Tokens(50, 50))
        await asyncio.sleep(0.01)
        assert not third.done()
        await limits.settle(tickets[1] or 0, Tokens(50, 50))
        assert await third is not None
        fourth = asyncio.create_task(limits.admit(0, Tokens(300, 300)))
        await limits.settle(await third or 0, None)
        assert await fourth is not None
        await limits.settle(await fourth or 0, Tokens(300, 300))
        assert await limits.admit(0, Tokens(1, 0)) is None

    asyncio.run(run())


def test_what_an_asker_that_died_had_under_way_is_forgotten() -> None:
    async def run() -> None:
        limits = Limits(Pace(None, None, 0.0), Budget(tokens=500))
        assert await limits.admit(7, Tokens(200, 200)) is not None
        waiting = asyncio.create_task(limits.admit(7, Tokens(200, 200)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await limits.begin(7)
        assert await waiting is None
        assert await limits.admit(7, Tokens(200, 200)) is not None

    asyncio.run(run())


def test_money_is_a_budget_too() -> None:
    budget = Budget(money=1.0, price_prompt=2.0, price_completion=8.0)
    assert budget.cost(Tokens(100_000, 100_000)) == 1.0
    assert budget.covers(Tokens(100_000, 100_000))
    assert not budget.covers(Tokens(100_001, 100_000))
    assert all(Budget().covers(Tokens(number, number)) for number in itertools.accumulate([10**9] * 3))
