"""Something that is done every few seconds."""

import time


class Due:
    """True at most once in `seconds`, and the first time at once."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, float("-inf")

    def __call__(self) -> bool:
        """Whether it is time again; asking is doing."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
