"""A hang is a failure: an alarm that ends whatever a test waits for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread once the time is over."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:g} s: it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        # The limit on the whole test, which was set aside, goes on.
        signal.setitimer(signal.ITIMER_REAL, *left)
