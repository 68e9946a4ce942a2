"""What each phase of a rank's life takes: seconds, CPU seconds, and the peak of its memory as seen from outside.

Anonymous memory (`RssAnon` in `/proc/PID/status`) is a process's own; mapped files (`RssFile`) are pages that the
processes of a machine share and the system can drop. Both are read every 20 ms by the process that started the ranks,
which needs no turn of theirs.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import distributed


@dataclass(frozen=True)
class Memory:
    """Of a process, in bytes."""

    anonymous: int
    mapped: int


def memory_of(pid: int | str) -> Memory | None:
    """Of a process that may have ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = {line.split(":")[0]: line.split() for line in lines if line.startswith("Rss")}
    if "RssAnon" not in found:
        return None
    return Memory(int(found["RssAnon"][1]) << 10, int(found["RssFile"][1]) << 10)


@dataclass
class Phase:
    """One phase of one rank."""

    began: float
    """On the monotonic clock, which all processes of a machine have in common."""
    ended: float
    seconds: float
    """Of this rank, without waiting for the others."""
    cpu_seconds: float
    """Of all threads of this rank, until all ranks are through."""
    before: int
    """Bytes of anonymous memory when it began."""
    after: int
    mapped_before: int


class Phases:
    """Notes the phases of the rank that it lives in. All ranks begin a phase together and end it together."""

    def __init__(self) -> None:
        self.found: dict[str, Phase] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body is the phase."""
        distributed.barrier()
        before = memory_of("self")
        cpu, began = time.process_time(), time.monotonic()
        yield
        seconds = time.monotonic() - began
        distributed.barrier()
        ended, used = time.monotonic(), time.process_time() - cpu
        after = memory_of("self")
        assert before is not None and after is not None
        self.found[name] = Phase(
            began, ended, seconds, used, before.anonymous, after.anonymous, before.mapped
        )


class Watch:
    """Keeps what the ranks' memory was, moment by moment."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, list[Memory | None]]] = []

    def __call__(self, pids: list[int]) -> None:
        """Look at all of them."""
        self._seen.append((time.monotonic(), [memory_of(pid) for pid in pids]))

    def peaks(self, rank: int, phase: Phase) -> dict[str, Any]:
        """The phase as numbers: bytes over the level at its beginning."""
        seen = [found[rank] for moment, found in self._seen if phase.began <= moment <= phase.ended]
        known = [one for one in seen if one is not None]
        anonymous = max([phase.before, phase.after, *(one.anonymous for one in known)])
        mapped = max([phase.mapped_before, *(one.mapped for one in known)])
        numbers = {key: value for key, value in asdict(phase).items() if key in ("seconds", "cpu_seconds")}
        return numbers | {
            "looks": len(known),
            "anonymous": anonymous - phase.before,
            "kept": phase.after - phase.before,
            "mapped": mapped - phase.mapped_before,
        }
