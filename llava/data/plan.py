"""Which samples make a global batch, and where they are computed.

A global batch is a list of samples. Its order comes from (seed, epoch, position) alone: row groups are
shuffled, then samples within a window of row groups. Ranks, rows and packing only decide where a sample is
computed, so the same seed gives the same samples per step on any number of workers.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.conversation import BadSample, Encoder
from llava.data.reader import ParquetRows
from llava.data.samples import VIEWS

_WINDOW = 8


@dataclass
class Coverage:
    """What the scan of a dataset found: nothing is lost silently."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first few ids with the message."""

    @property
    def lost(self) -> float:
        """Share of the samples that were refused."""
        total = self.samples + self.refused.total()
        return self.refused.total() / total if total else 1.0

    def refuse(self, reason: str, sample: str, message: str) -> None:
        """Count one refused sample and keep the first few ids of each reason."""
        self.refused[reason] += 1
        if len(found := self.examples.setdefault(reason, [])) < 5:
            found.append(f"{sample}: {message}")

    def as_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "truncated": self.truncated,
            "refused": dict(self.refused),
            "refused_examples": self.examples,
        }


@dataclass
class SampleIndex:
    """N samples: where each lies and how long it is. All arrays have shape (N,)."""

    group: np.ndarray
    row: np.ndarray
    part: np.ndarray
    """Which of the row's samples (a row with five captions has five in stage 1)."""
    tokens: np.ndarray
    supervised: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    def save(self, path: Path) -> None:
        """As one .npz file (plain arrays, no pickle)."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "SampleIndex":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def scan(rows: ParquetRows, view: str, encoder: Encoder) -> tuple[SampleIndex, Coverage]:
    """Measure every sample of a dataset once: its length, its supervised tokens, its images."""
    samples_of, columns = VIEWS[view]
    coverage = Coverage()
    found: list[tuple[int, int, int, int, int, int]] = []
    light = ["image.path" if column == "image" else column for column in columns]
    for group in range(len(rows.groups)):
        for number, row in enumerate(rows.table(group, light).to_pylist()):
            for part, turns in enumerate(samples_of(row)):
                try:
                    encoded = encoder.encode(turns, images=int(row["image"] is not None))
                except BadSample as bad:
                    coverage.refuse(bad.reason, row["id"], str(bad))
                    continue
                coverage.samples += 1
                coverage.tokens += len(encoded.ids)
                coverage.supervised += encoded.supervised
                coverage.truncated += encoded.truncated
                found.append((group, number, part, len(encoded.ids), encoded.supervised, encoded.images))
    columns_of = np.array(found, dtype=np.int64).reshape(len(found), 6).T
    return SampleIndex(*columns_of), coverage


@dataclass
class Plan:
    """The order of all steps of a run, over `index`."""

    index: SampleIndex
    seed: int
    epochs: float
    global_batch: int
    """Samples per step, over all workers."""
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller: no sample is dropped or seen twice."""
        return -(-len(self.index) // self.global_batch)

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return max(1, round(self.steps_per_epoch * self.epochs))

    def samples(self, step: int) -> np.ndarray:
        """Indices of the samples of one global batch; a pure function of (seed, step)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        return order[position * self.global_batch : (position + 1) * self.global_batch]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {epoch: epoch_order(self.index.group, self.seed, epoch)}
        return self._orders[epoch]


def epoch_order(group: np.ndarray, seed: int, epoch: int, window: int = _WINDOW) -> np.ndarray:
    """Every sample once: row groups shuffled, then samples within `window` row groups. `group`: (N,) -> (N,)."""
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    groups = random.permutation(int(group.max()) + 1)
    by_group = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[by_group], np.arange(len(groups) + 1))
    members = [by_group[edges[number] : edges[number + 1]] for number in groups]
    return np.concatenate(
        [
            random.permutation(np.concatenate(members[start : start + window]))
            for start in range(0, len(groups), window)
        ]
    )


def assign(tokens: np.ndarray, ranks: int, tokens_per_row: int) -> list[list[list[int]]]:
    """Place the samples of one global batch: `[rank][row] -> positions in tokens`.

    `tokens`: (n,) lengths. Ranks get nearly equal sums (longest first, to the lightest rank); each rank has
    the same number of rows, some perhaps empty; no row is over `tokens_per_row` unless one sample alone is.
    """
    per_rank = _lightest_first(tokens, list(range(len(tokens))), ranks)
    packed = [_first_fit(tokens, mine, tokens_per_row) for mine in per_rank]
    count = max(1, *(len(rows) for rows in packed))
    placed = []
    for mine, rows in zip(per_rank, packed, strict=True):
        even = _lightest_first(tokens, mine, count)
        fits = all(len(row) <= 1 or tokens[row].sum() <= tokens_per_row for row in even)
        placed.append(even if fits else rows + [[] for _ in range(count - len(rows))])
    return placed


def _lightest_first(tokens: np.ndarray, members: list[int], bins: int) -> list[list[int]]:
    loads = [0] * bins
    out: list[list[int]] = [[] for _ in range(bins)]
    for index in sorted(members, key=lambda index: (-int(tokens[index]), index)):
        lightest = loads.index(min(loads))
        out[lightest].append(index)
        loads[lightest] += int(tokens[index])
    return out


def _first_fit(tokens: np.ndarray, members: list[int], limit: int) -> list[list[int]]:
    rows: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(members, key=lambda index: (-int(tokens[index]), index)):
        size = int(tokens[index])
        for number, load in enumerate(loads):
            if load + size <= limit:
                rows[number].append(index)
                loads[number] += size
                break
        else:
            rows.append([index])
            loads.append(size)
    return rows
