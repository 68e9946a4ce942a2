"""Asking: some requests under way at once, by Ray actors, each answer stored before the next request takes its place.

A request is under way until its answer is stored, so a crash costs at most `instruct.concurrency` answers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.chat import told as told_by
from components.contract import Folder, Guard, Job
from components.contract.pace import Due, Speed
from components.instruct.llm.endpoint import LOOK_AT, Endpoint
from components.instruct.llm.limits import Budget, Gate, Limits, Pace, SharedLimits, Tokens
from components.instruct.llm.prompts import Prompts
from components.instruct.llm.requests import Request, Requests
from components.instruct.llm.responses import ANSWERED, Response, Writer, stored
from components.instruct.settings import InstructSettings
from components.ray_cluster.connection import failures_told
from components.ray_cluster.spread import beside_the_driver
from llava.errors import RefusedInput

CHECK_EVERY_SECONDS = 5.0
RESTARTS = 3
FIRST = 20
"""Answers; if each of them is a refusal (status 4xx) and there are no others, nothing more is asked."""


@dataclass
class Tally:
    """What asking has come to in this run.

    `refused`: of what was answered, with a status 4xx; `faults`: tries without an answer, by reason; `uncounted`:
    answers whose tokens are taken from their length, since what the endpoint says of them cannot be.
    """

    answered: int = 0
    refused: int = 0
    tokens: Tokens = Tokens()  # noqa: RUF009 - a NamedTuple never changes
    faults: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)
    used_up: bool = False

    def add(self, other: Tally) -> None:
        """Take in what another asker has come to."""
        self.answered += other.answered
        self.refused += other.refused
        self.tokens += other.tokens
        self.faults.update(other.faults)
        self.uncounted.update(other.uncounted)
        self.used_up |= other.used_up


@dataclass(frozen=True)
class Work:
    """What every asker is told: from these shards' requests, those whose response the artifact has not stored yet."""

    settings: InstructSettings
    prompts: Prompts
    dataset: Folder
    shards: tuple[str, ...]
    folder: Folder
    guard: Guard


class ArtifactLimits(Limits):
    """The gate of one artifact, on the clock of the process that it is made in."""

    def __init__(self, settings: InstructSettings, spent: Tokens) -> None:
        pace = Pace(settings.requests_per_minute, settings.tokens_per_minute, time.monotonic())
        super().__init__(pace, budget_of(settings), spent)


async def ask(
    requests: Iterator[Request],
    endpoint: Endpoint,
    gate: Gate,
    writer: Writer,
    tally: Tally,
    *,
    asker: int = 0,
    concurrency: int,
    proven: bool = False,
) -> None:
    """Answer and store every request, at most `concurrency` under way; ends early with `tally.used_up`.

    After a failure nothing new leaves, what is under way is stored, then the failure is raised. `proven`: the endpoint
    has answered requests of this form; otherwise RefusedInput if it refuses all of the first ones.
    """
    stop = asyncio.Event()
    failures: list[Exception] = []
    tally.faults, tally.uncounted = endpoint.faults, endpoint.uncounted

    async def one_after_another() -> None:
        for request in requests:
            response = await endpoint.answer(request, gate, asker, stop)
            if response is None:
                tally.used_up |= not stop.is_set()
                stop.set()
            else:
                await writer.put(response)
                tally.answered += 1
                tally.tokens += response.tokens
                tally.refused += response.status != ANSWERED
                if not proven and tally.refused == tally.answered >= FIRST:
                    raise _all_refused(response, tally.refused)
            if stop.is_set():
                return

    async def until_failure() -> None:
        try:
            await one_after_another()
        except Exception as failure:
            failures.append(failure)
            stop.set()

    await asyncio.gather(*(until_failure() for _ in range(concurrency)))
    if failures:
        raise failures[0]


class Asker:
    """One process that asks: every `count`-th request is its own."""

    def __init__(self, work: Work, number: int, count: int) -> None:
        self._work, self._number, self._count = work, number, count
        self._tally = Tally()

    async def tally(self) -> Tally:
        """How far `ask` has come."""
        return self._tally

    async def ask(self, limits: Any | None) -> Tally:
        """Ask until nothing is missing or the budget is used up; after a crash of this process, once more.

        `limits` is the actor that several askers share; None: this one keeps to the limits by itself.
        """
        work, settings = self._work, self._work.settings
        found = stored(work.folder)
        gate = ArtifactLimits(settings, found.tokens) if limits is None else SharedLimits(limits)
        await gate.begin(self._number)
        async with (
            Endpoint(settings) as endpoint,
            Writer(work.folder, _now_and_then(work.guard.check)) as writer,
        ):
            await ask(
                self._missing(found.digests),
                endpoint,
                gate,
                writer,
                self._tally,
                asker=self._number,
                concurrency=-(-settings.concurrency // self._count),
                proven=bool(found.digests),
            )
        return self._tally

    def _missing(self, answered: set[bytes]) -> Iterator[Request]:
        every = Requests(self._work.settings, self._work.prompts).of_files(
            self._work.dataset, self._work.shards
        )
        for number, request in enumerate(every):
            if number % self._count == self._number and bytes.fromhex(request.digest) not in answered:
                yield request


def ask_all(job: Job[InstructSettings], work: Work, missing: int, spent: Tokens) -> Tally:
    """Ask for everything that is missing; returns what that came to. Ray must be initialised."""
    import ray

    settings = work.settings
    count = min(settings.askers, settings.concurrency, missing)
    shared: Any = None
    if count > 1:
        actor: Any = ray.remote(ArtifactLimits).options(num_cpus=0, max_concurrency=10_000)
        shared = actor.remote(settings, spent)
    # Beside the driver: asking waits more than it computes, and the key is nowhere else.
    remote: Any = ray.remote(Asker).options(
        num_cpus=0,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        scheduling_strategy=beside_the_driver(),
    )
    actors = [remote.remote(work, number, count) for number in range(count)]
    total, running = Tally(), {actor.ask.remote(shared): actor for actor in actors}
    progress = _Progress(job, settings, missing, spent)
    try:
        with failures_told(f"a process that asks the teacher died {RESTARTS + 1} times"):
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                for reference in done:
                    del running[reference]
                    total.add(ray.get(reference))
                if progress.due():
                    job.lease.check()
                    progress.say(total, _so_far(list(running.values())))
    finally:
        for actor in [*actors, *([shared] if shared else [])]:
            ray.kill(actor)
    return total


def budget_of(settings: InstructSettings) -> Budget:
    """The budget and the prices."""
    return Budget(
        settings.budget_tokens, settings.budget_money, settings.price_prompt, settings.price_completion
    )


class _Progress:
    """Plain lines, seconds apart, with the time that is left at the pace so far."""

    def __init__(
        self, job: Job[InstructSettings], settings: InstructSettings, missing: int, spent: Tokens
    ) -> None:
        self._job, self._missing, self._spent = job, missing, spent
        self._budget = budget_of(settings)
        self._speed, self.due = Speed(), Due(at_once=False)

    def say(self, finished: Tally, running: Sequence[Tally]) -> None:
        """One line about the askers that are through and those that are not."""
        together = Tally()
        for tally in [finished, *running]:
            together.add(tally)
        text = f"{together.answered:,} of {self._missing:,} requests answered"
        if left := self._speed.left(together.answered, self._missing):
            text += f", {self._speed.per_second(together.answered):,.1f} a second, about {left} left"
        text += f"; {told(self._spent + together.tokens, self._budget)}"
        if together.faults:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in together.faults.most_common())
            text += f"; tried again: {reasons}"
        if together.uncounted:
            text += f"; impossible token counts: {together.uncounted.total():,} (taken by length)"
        self._job.say(text)


def _all_refused(response: Response, count: int) -> RefusedInput:
    return RefusedInput(
        f"the endpoint refuses each of the first {count} requests, such as {response.type} of {response.photo} (status "
        f"{response.status}: {told_by(response.body)}); {LOOK_AT}. Run again then: they are asked again"
    )


def told(tokens: Tokens, budget: Budget) -> str:
    """Tokens in words, with what they cost where prices are known."""
    text = f"{tokens.prompt:,} + {tokens.completion:,} tokens"
    cost = budget.cost(tokens)
    return f"{text}, cost {cost:,.4f}" if cost else text


def _so_far(actors: Sequence[Any]) -> list[Tally]:
    """What running askers have come to; one that is being started again has nothing to tell."""
    import ray

    asked = [actor.tally.remote() for actor in actors]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=1.0) if asked else ([], [])
    found: list[Tally] = []
    for reference in ready:
        try:
            found.append(ray.get(reference))
        except ray.exceptions.RayError:
            continue
    return found


def _now_and_then(check: Callable[[], None]) -> Callable[[], None]:
    """`check`, called through at most every few seconds: it reads from the store."""
    due = Due(CHECK_EVERY_SECONDS)

    def sometimes() -> None:
        if due():
            check()

    return sometimes
