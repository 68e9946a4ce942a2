"""Lines while something takes its time: every few seconds, with the time that is left in words."""

from __future__ import annotations

import time

SAY_EVERY_SECONDS = 5.0
"""Between two lines about the same work."""


class Due:
    """True at most once in `seconds`; the first time at once, or only when they are over."""

    def __init__(self, seconds: float = SAY_EVERY_SECONDS, at_once: bool = True) -> None:
        self._seconds = seconds
        self._last = float("-inf") if at_once else time.monotonic()

    def __call__(self) -> bool:
        """Whether it is time again; asking is doing."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Speed:
    """How fast work goes since it began, and how long the rest takes at that speed."""

    def __init__(self, done: float = 0) -> None:
        """`done`: what was there before, which does not count for the speed."""
        self._before, self._began = done, time.monotonic()

    def per_second(self, done: float) -> float:
        """What was done per second since then; `done`: all that is done by now."""
        return (done - self._before) / max(time.monotonic() - self._began, 1e-9)

    def left(self, done: float, whole: float) -> str | None:
        """The time for the rest of `whole`, in words; None where nothing was done yet."""
        speed = self.per_second(done)
        return duration((whole - done) / speed) if speed > 0 else None


def duration(seconds: float) -> str:
    """A time in words: 95 s, 12 min, 3 h 05 min."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min"
