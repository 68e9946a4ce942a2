"""One function over many pieces, a Ray task each: so many at once, tried again, results as they come.

For what is only counted or compared. What writes a dataset's files goes through `shard_tasks.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import ray

from components.contract.component import Job
from components.contract.store import StoreError
from llava.errors import LlavaError, RefusedInput

RETRIES = 3
SAY_EVERY_SECONDS = 5.0

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def spread(
    job: Job,
    doing: str,
    work: Callable[[Shared, Piece], Result],
    shared: Shared,
    pieces: Sequence[Piece],
    workers: int | None = None,
) -> Iterator[tuple[int, Result]]:
    """(number of the piece, `work(shared, piece)`), in the order in which they finish.

    Ray must be initialised. `work` is a function of a module that depends on its arguments only; `shared` goes to
    every node once. At most `workers` run at once (None: every CPU of the cluster), and no more results than that
    wait. Raises LlavaError for a piece that fails for good; `doing` names the work in it and in the progress.
    """
    task = ray.remote(
        num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD", retry_exceptions=[OSError, StoreError]
    )(work)
    everywhere = ray.put(shared)
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    queue = iter(enumerate(pieces))
    running: dict[Any, int] = {}
    started = said = time.monotonic()
    finished = 0
    try:
        while True:
            for number, piece in islice(queue, at_once - len(running)):
                running[task.remote(everywhere, piece)] = number
            if not running:
                break
            done, _ = ray.wait(list(running), num_returns=1, timeout=SAY_EVERY_SECONDS)
            for reference in done:
                yield running.pop(reference), _result(reference, doing)
                finished += 1
            job.lease.check()
            now = time.monotonic()
            if finished and now - said >= SAY_EVERY_SECONDS:
                said = now
                left = (now - started) / finished * (len(pieces) - finished)
                job.say(f"{doing}: {finished:,} of {len(pieces):,} files, about {left:,.0f} s left")
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(reference: Any, doing: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RefusedInput):
            raise RefusedInput(f"{doing}: {cause}") from error
        text = str(cause) if isinstance(cause, LlavaError) else f"{type(cause).__name__}: {cause}"
        raise LlavaError(f"{doing}: {text}") from error
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[0]
        raise LlavaError(f"{doing}: its worker died {RETRIES + 1} times: {line}") from error
