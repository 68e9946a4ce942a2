"""One function over many pieces, a Ray task each: so many at once, tried again, results as they come.

`spread` is for what is only counted or compared; a dataset's files are written through `components/datasets/tasks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from components.contract.component import Job
from components.contract.pace import SAY_EVERY_SECONDS, Due, Speed
from components.contract.printable import one_line
from llava.errors import LlavaError, RefusedInput

RETRIES = 3
PLACED: dict[str, Any] = {
    "num_cpus": 1,
    "max_retries": RETRIES,
    "scheduling_strategy": "SPREAD",
    "retry_exceptions": [OSError],
}
"""How Ray runs a piece: one CPU, over all nodes, again where a process or a disk fails."""

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def spread(
    job: Job[Any],
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
    import ray

    task = ray.remote(**PLACED)(work)
    everywhere = ray.put(shared)
    speed, due = Speed(), Due(at_once=False)
    finished = 0

    def look() -> None:
        job.lease.check()
        if finished and due():
            left = speed.left(finished, len(pieces))
            job.say(f"{doing}: {finished:,} of {len(pieces):,} files, about {left} left")

    def submit(numbered: tuple[int, Piece]) -> Any:
        return task.remote(everywhere, numbered[1])

    for (number, _), reference in in_flight(submit, list(enumerate(pieces)), workers, look):
        yield number, result_of(reference, doing)
        finished += 1


def beside_the_driver() -> Any:
    """A scheduling strategy: on the node of this process and on no other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def in_flight(
    submit: Callable[[Piece], Any], pieces: Sequence[Piece], workers: int | None, look: Callable[[], None]
) -> Iterator[tuple[Piece, Any]]:
    """`submit(piece)` for each piece, at most `workers` at once (None: every CPU of the cluster).

    Gives each piece with the reference of its finished task, in the order in which they finish. `look` is called
    after every result, and every few seconds in which none comes; what it raises ends all tasks.
    """
    import ray

    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    queue = iter(pieces)
    running: dict[Any, Piece] = {}
    try:
        while True:
            for piece in islice(queue, at_once - len(running)):
                running[submit(piece)] = piece
            if not running:
                break
            done, _ = ray.wait(list(running), num_returns=1, timeout=SAY_EVERY_SECONDS)
            for reference in done:
                yield running.pop(reference), reference
            look()
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def result_of(reference: Any, doing: str) -> Any:
    """What a task gave; LlavaError, which names what it was `doing`, for one that failed for good."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RefusedInput):
            raise RefusedInput(f"{doing}: {cause}") from error
        text = str(cause) if isinstance(cause, LlavaError) else f"{type(cause).__name__}: {cause}"
        raise LlavaError(f"{doing}: {text}") from error
    except ray.exceptions.RayError as error:
        raise LlavaError(f"{doing}: its worker died {RETRIES + 1} times: {one_line(error)}") from error
