"""In which order an epoch's samples are seen: a pure function of (seed, epoch), for any number of workers.

Shapes: N samples, G row groups, E entries of an epoch (a sample of weight 2 has two), W windows.
"""

from dataclasses import dataclass

import numpy as np

WINDOW = 64
"""Row groups that are open at a time, on all ranks together."""

_DRAWS = 2**63  # keys of the draws lie above those of the epochs


@dataclass(frozen=True)
class Epoch:
    """One epoch's order."""

    order: np.ndarray
    """(E,) indices of samples."""
    edges: np.ndarray
    """(W + 1,) where the windows begin and end in `order`."""

    def windows(self, first: int, last: int) -> np.ndarray:
        """(last - first,) the window of each entry from `first` on."""
        return np.searchsorted(self.edges, np.arange(first, last), side="right") - 1


def times_seen(group: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often each sample is seen in an epoch, (N,). `group`: (N,); `weights`: (G,) of the row groups.

    The whole part of a weight holds for all its samples. The fraction is drawn: always equally many, and over
    the epochs every sample in turn.
    """
    of_sample = weights[group]
    times: np.ndarray = np.floor(of_sample).astype(np.int64)
    for number, weight in enumerate(np.unique(weights)):
        members = np.flatnonzero(of_sample == weight)
        if drawn := round(float(weight % 1) * len(members)):
            random = np.random.Generator(np.random.Philox(key=[seed, _DRAWS + number]))
            turn = (epoch * drawn + np.arange(drawn)) % len(members)
            times[random.permutation(members)[turn]] += 1
    return times


def epoch_order(group: np.ndarray, times: np.ndarray, seed: int, epoch: int, window: int = WINDOW) -> Epoch:
    """Each sample as often as `times` says: row groups shuffled, then samples within `window` row groups.

    Inside a window every group's samples are shuffled and spread evenly over it. A sample's second time is a
    pass of its own over its row group, elsewhere in the epoch. `group`, `times`: (N,).
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    entries = np.repeat(np.arange(len(group)), times)
    passes = np.arange(len(entries)) - np.repeat(np.cumsum(times) - times, times)
    shuffled = random.permutation(len(entries))
    entries, passes = entries[shuffled], passes[shuffled]
    _, unit, size = np.unique(
        passes * (int(group.max()) + 1) + group[entries], return_inverse=True, return_counts=True
    )
    by_unit = np.argsort(unit, kind="stable")
    inside = np.empty(len(entries))
    inside[by_unit] = np.arange(len(entries)) - np.repeat(np.cumsum(size) - size, size)
    spread = (inside + random.random(len(entries))) / size[unit]
    count = -(-len(size) // window)
    window_of = np.empty(len(size), dtype=np.int64)
    for number, units in enumerate(np.array_split(random.permutation(len(size)), count)):
        window_of[units] = number
    # The window first, then the place inside it: a sum of the two could round up into the next window.
    order = np.lexsort((spread, window_of[unit]))
    edges = np.cumsum([0, *np.bincount(window_of[unit], minlength=count)])
    return Epoch(entries[order], edges)
