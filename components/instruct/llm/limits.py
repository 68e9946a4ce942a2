"""One limit for all: requests and tokens in any minute, and a budget after which nothing leaves any more.

Requests are spaced evenly, a minute's worth over 62 seconds: what left within 62 seconds never arrives as more than
a minute's worth, as long as a request reaches the endpoint within two seconds. Tokens are reserved when a request
leaves (the most that it may take) and corrected when the endpoint has counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

WINDOW = 62.0


class Tokens(NamedTuple):
    """Tokens of prompts and of answers."""

    prompt: int = 0
    completion: int = 0

    @property
    def all(self) -> int:
        """Both together."""
        return self.prompt + self.completion

    def __add__(self, other: Tokens) -> Tokens:  # type: ignore[override]
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


@dataclass(frozen=True)
class Budget:
    """What an artifact may cost; prices are for a million tokens. None: no end."""

    tokens: int | None = None
    money: float | None = None
    price_prompt: float = 0.0
    price_completion: float = 0.0

    def cost(self, used: Tokens) -> float:
        """What tokens cost."""
        return (used.prompt * self.price_prompt + used.completion * self.price_completion) / 1e6

    def covers(self, used: Tokens) -> bool:
        """Whether so much is allowed."""
        return (self.tokens is None or used.all <= self.tokens) and (
            self.money is None or self.cost(used) <= self.money
        )


class Pace:
    """Requests and tokens per minute, as arithmetic on a clock that the caller reads."""

    def __init__(self, requests: int | None, tokens: int | None, now: float) -> None:
        self._spacing = WINDOW / requests if requests else 0.0
        self._most = tokens
        # A request may have left a moment ago: the one that tried the endpoint, or those of a run that was killed.
        self._next = now + self._spacing
        self._recent: deque[tuple[float, int]] = deque()
        self._counted: dict[int, int] = {}
        self._sum = 0

    def wait(self, now: float, tokens: int) -> float:
        """Seconds until a request of at most `tokens` tokens may leave; 0 is now."""
        while self._recent and self._recent[0][0] <= now - WINDOW:
            self._sum -= self._counted.pop(self._recent.popleft()[1], 0)
        wait = max(0.0, self._next - now)
        # A request larger than a whole minute's tokens goes alone.
        if self._most is not None and self._sum and self._sum + tokens > self._most:
            wait = max(wait, self._recent[0][0] + WINDOW - now)
        return wait

    def leave(self, now: float, ticket: int, tokens: int) -> None:
        """A request leaves now."""
        self._next = now + self._spacing
        if self._most is not None:
            self._recent.append((now, ticket))
            self._counted[ticket] = tokens
            self._sum += tokens

    def correct(self, ticket: int, tokens: int) -> None:
        """The endpoint has counted the tokens of a request."""
        if ticket in self._counted:
            self._sum += tokens - self._counted[ticket]
            self._counted[ticket] = tokens


class Gate(Protocol):
    """Where every try asks whether it may leave."""

    async def admit(self, asker: int, most: Tokens) -> int | None:
        """Wait until a request of at most so many tokens may leave; its ticket, or None: the budget is used up."""

    async def settle(self, ticket: int, used: Tokens | None) -> None:
        """A request came back with so many tokens, or (None) without an answer."""


class Limits:
    """The gate itself. Within one process it is called as it is; a Ray actor made of it serves several."""

    def __init__(
        self,
        pace: Pace,
        budget: Budget,
        spent: Tokens = Tokens(),  # noqa: B008 - a NamedTuple never changes
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace, self._budget, self._clock = pace, budget, clock
        self._spent = spent
        self._open: dict[int, tuple[int, Tokens]] = {}
        self._reserved = Tokens()
        self._tickets = 0
        self._lives: Counter[int] = Counter()
        self._used_up = False
        self._turn = asyncio.Lock()
        self._settled = asyncio.Event()

    async def admit(self, asker: int, most: Tokens) -> int | None:
        """See `Gate`; first come, first served."""
        life = self._lives[asker]
        async with self._turn:
            # An asker that died while it waited here must not leave a ticket behind that nobody settles.
            while not self._used_up and life == self._lives[asker]:
                self._settled.clear()
                wait: float | None = self._pace.wait(self._clock(), most.all)
                if not self._budget.covers(self._spent + self._reserved + most):
                    # What is under way may take less than is reserved for it.
                    self._used_up = not self._open
                    wait = None
                elif not wait:
                    return self._leave(asker, most)
                if not self._used_up:
                    await self._until_settled(wait)
            return None

    async def settle(self, ticket: int, used: Tokens | None) -> None:
        """See `Gate`. A request that brought no answer keeps its place among the minute's tokens."""
        opened = self._open.pop(ticket, None)
        if opened is None:
            return
        self._reserved -= opened[1]
        if used is not None:
            self._spent += used
            self._pace.correct(ticket, used.all)
        self._settled.set()

    async def begin(self, asker: int) -> None:
        """An asker starts, perhaps in the place of one that died: what that one had under way is forgotten."""
        self._lives[asker] += 1
        for ticket in [ticket for ticket, (owner, _) in self._open.items() if owner == asker]:
            await self.settle(ticket, None)

    def _leave(self, asker: int, most: Tokens) -> int:
        self._tickets += 1
        self._pace.leave(self._clock(), self._tickets, most.all)
        self._open[self._tickets] = asker, most
        self._reserved += most
        return self._tickets

    async def _until_settled(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return


class SharedLimits:
    """The gate of an asker among several: `Limits` in a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def admit(self, asker: int, most: Tokens) -> int | None:
        """See `Gate`."""
        ticket: int | None = await self._actor.admit.remote(asker, most)
        return ticket

    async def settle(self, ticket: int, used: Tokens | None) -> None:
        """See `Gate`."""
        await self._actor.settle.remote(ticket, used)

    async def begin(self, asker: int) -> None:
        """See `Limits`."""
        await self._actor.begin.remote(asker)
