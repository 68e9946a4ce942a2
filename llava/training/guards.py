"""Who is to blame when the loss jumps: a guard that remembers what is usual."""

import statistics
from collections import deque
from collections.abc import Iterable


class SpikeGuard:
    """Finds the steps whose loss is above `factor` times the median of the last `window` steps."""

    def __init__(self, factor: float, before: Iterable[float] = (), window: int = 100, least: int = 20):
        """`before`: the losses of earlier steps; with fewer than `least` of them nothing is a spike yet."""
        self._factor, self._least = factor, least
        self._recent: deque[float] = deque(before, maxlen=window)

    def median(self, loss: float) -> float | None:
        """The median that `loss` is far above, or None. The loss counts from the next step on."""
        usual = statistics.median(self._recent) if len(self._recent) >= self._least else None
        self._recent.append(loss)
        return usual if usual is not None and loss > self._factor * usual else None
