"""How far the workers are: a small actor beside the driver, and the client through which all speak to it."""

from dataclasses import dataclass
from typing import Any

from components.ray_cluster.spread import beside_the_driver


@dataclass
class Progress:
    """One moment of a training run."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    tokens_per_second: float
    mfu: float | None = None
    """None where the device's peak is not known."""
    gpu_memory_gib: float | None = None
    """Peak so far; None on a CPU."""


class ProgressActor:
    """What the workers write and the driver reads, and the other way round; it runs as a Ray actor."""

    def __init__(self) -> None:
        self._standing: Progress | None = None
        self._failure: tuple[str, int] | None = None
        self._notes: list[str] = []
        self._stopping = False
        self._stopped: int | None = None

    def note(self, text: str) -> None:
        """A line for the user."""
        self._notes.append(text)

    def notes(self, first: int) -> list[str]:
        """The lines from number `first` on."""
        return self._notes[first:]

    def put(self, standing: Progress) -> None:
        """Where rank 0 is."""
        self._standing = standing

    def get(self) -> Progress | None:
        """What `put` was given last."""
        return self._standing

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether they are asked to."""
        return self._stopping

    def stopped(self, step: int | None) -> None:
        """They have saved after `step` and compute no other; None: they are at work again."""
        self._stopped = step

    def stopped_after(self) -> int | None:
        """The step after which they saved for the last time, or None."""
        return self._stopped

    def fail(self, message: str, status: int) -> None:
        """A failure that a restart would only repeat: message and exit status."""
        self._failure = self._failure or (message, status)

    def failure(self) -> tuple[str, int] | None:
        """What `fail` was told first."""
        return self._failure


def start_progress_actor() -> Any:
    """A `ProgressActor` on the node of this process, which no other node's end can take away."""
    import ray

    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(ProgressActor)
    return actor.options(scheduling_strategy=beside_the_driver()).remote()


class ProgressClient:
    """Speaks to the actor from wherever it is. An actor that is lost never ends what it tells of."""

    def __init__(self, progress_actor: Any, timeout: float = 10.0):
        self._actor, self._timeout = progress_actor, timeout

    def note(self, text: str) -> None:
        """A line for the user."""
        self._actor.note.remote(text)

    def notes(self, first: int) -> list[str]:
        """The lines from number `first` on."""
        return self._ask(self._actor.notes.remote(first)) or []

    def put(self, standing: Progress) -> None:
        """Where the run is."""
        self._actor.put.remote(standing)

    def get(self) -> Progress | None:
        """Where the run is, if somebody knows."""
        found: Progress | None = self._ask(self._actor.get.remote())
        return found

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._ask(self._actor.stop.remote())

    def stopping(self) -> bool:
        """Whether the workers are asked to."""
        return bool(self._ask(self._actor.stopping.remote()))

    def stopped(self, step: int | None) -> None:
        """The workers have saved after `step` and compute no other; None: they are at work again."""
        self._ask(self._actor.stopped.remote(step))

    def stopped_after(self) -> int | None:
        """The step after which the workers saved for the last time, or None."""
        step: int | None = self._ask(self._actor.stopped_after.remote())
        return step

    def fail(self, message: str, status: int) -> None:
        """A failure that a restart would only repeat."""
        self._ask(self._actor.fail.remote(message, status))

    def failure(self) -> tuple[str, int] | None:
        """What `fail` was told, or None."""
        told: tuple[str, int] | None = self._ask(self._actor.failure.remote())
        return told

    def _ask(self, asked: Any) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return ray.get(asked, timeout=self._timeout)
        except (RayError, GetTimeoutError):
            return None
