"""How long every sample is, which samples make a global batch, and where they are computed.

A global batch is a list of samples. Its order comes from (seed, epoch, position) alone (`llava/data/order.py`).
Ranks, rows and packing only decide where a sample is computed (`llava/data/placement.py`), so the same seed gives the
same samples per step on any number of workers.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.conversation import Encoder
from llava.data import placement
from llava.data.order import Epoch, epoch_order, times_seen
from llava.data.reader import Rows
from llava.data.samples import VIEWS
from llava.data.schema import images_of
from llava.errors import BadSample

_LIGHT = {"image": "image.path", "more_images": "more_images.list.element.path"}


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

    def add(self, other: "Coverage") -> None:
        """Take in what was found in another dataset."""
        self.samples += other.samples
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.truncated += other.truncated
        self.refused.update(other.refused)
        for reason, found in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + found)[:5]

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Coverage":
        """What `to_bytes` wrote."""
        values = json.loads(data)
        return cls(**{**values, "refused": Counter(values["refused"])})

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
        with path.open("wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "SampleIndex":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})

    @classmethod
    def joined(cls, parts: Sequence["SampleIndex"]) -> "SampleIndex":
        """Several one after the other; their row groups are numbered through already."""
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
        )

    def only(self, chosen: np.ndarray) -> "SampleIndex":
        """The samples at the positions `chosen`."""
        return SampleIndex(**{name: values[chosen] for name, values in vars(self).items()})


def scan(rows: Rows, view: str, encoder: Encoder) -> tuple[SampleIndex, Coverage]:
    """Measure every sample of a dataset once: its length, its supervised tokens, its images."""
    samples_of, columns = VIEWS[view]
    coverage = Coverage()
    found: list[tuple[int, int, int, int, int, int]] = []
    light = [_LIGHT.get(column, column) for column in columns]
    for group in range(len(rows.weights)):
        for number, row in enumerate(rows.table(group, light).to_pylist()):
            images = len(images_of(row))
            for part, turns in enumerate(samples_of(row)):
                try:
                    encoded = encoder.encode(turns, images)
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
class BatchPlan:
    """The order of all steps of a run, over `index`."""

    index: SampleIndex
    seed: int
    epochs: float
    global_batch: int
    """Samples per step, over all workers."""
    weights: np.ndarray | None = None
    """(G,) times that the samples of each row group are seen in an epoch; None: once."""
    image_cost: float = 0.0
    """Work of an image in the vision tower, in tokens of the language model."""
    _epochs: dict[int, Epoch] = field(default_factory=dict, repr=False)
    _homes: dict[tuple[int, int, int], dict[int, tuple[int, ...]]] = field(default_factory=dict, repr=False)
    _entries: int = field(init=False, repr=False)
    """Of an epoch; the same in all."""

    def __post_init__(self) -> None:
        self._entries = int(self._times(0).sum())

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller: no sample is dropped."""
        return -(-self._entries // self.global_batch)

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return max(1, round(self.steps_per_epoch * self.epochs))

    def samples(self, step: int) -> np.ndarray:
        """Indices of the samples of one global batch; a pure function of (seed, step)."""
        number, first, last = self._where(step)
        return self._epoch(number).order[first:last]

    def place(self, step: int, ranks: int, tokens_per_row: int) -> list[placement.Rows]:
        """Where the samples of a step are computed: `[rank][row]` -> positions in `samples(step)`."""
        number, first, last = self._where(step)
        chosen = self.samples(step)
        windows = self._epoch(number).windows(first, last).tolist()
        choices = [
            self._homes_of(number, window, ranks)[group]
            for window, group in zip(windows, self.index.group[chosen].tolist(), strict=True)
        ]
        where = placement.balance(self._cost(chosen).tolist(), choices, ranks)
        members: list[list[int]] = [[] for _ in range(ranks)]
        for position, rank in enumerate(where):
            members[rank].append(position)
        return placement.pack(self.index.tokens[chosen], self.index.images[chosen], members, tokens_per_row)

    def open_groups(self, step: int) -> set[int]:
        """Row groups of the windows that a step draws from."""
        number, first, last = self._where(step)
        windows = np.unique(self._epoch(number).windows(first, last))
        return {group for window in windows for group in self._homes_of(number, int(window), 1)}

    def _where(self, step: int) -> tuple[int, int, int]:
        """The epoch of a step, and its first and last (not included) entry."""
        number, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch
        return number, first, min(first + self.global_batch, self._entries)

    def _epoch(self, number: int) -> Epoch:
        found = self._epochs.get(number)
        if found is None:
            found = epoch_order(self.index.group, self._times(number), self.seed, number)
            self._epochs, self._homes = {number: found}, {}
        return found

    def _homes_of(self, number: int, window: int, ranks: int) -> dict[int, tuple[int, ...]]:
        """The ranks that read each row group of a window."""
        found = self._homes.get((number, window, ranks))
        if found is None:
            epoch = self._epoch(number)
            held = epoch.order[epoch.edges[window] : epoch.edges[window + 1]]
            groups, of_entry = np.unique(self.index.group[held], return_inverse=True)
            loads = np.bincount(of_entry, self._cost(held), minlength=len(groups))
            found = dict(zip(groups.tolist(), placement.homes(loads.tolist(), ranks), strict=True))
            self._homes[number, window, ranks] = found
        return found

    def _times(self, number: int) -> np.ndarray:
        weights = np.ones(int(self.index.group.max()) + 1) if self.weights is None else self.weights
        return times_seen(self.index.group, weights, self.seed, number)

    def _cost(self, samples: np.ndarray) -> np.ndarray:
        cost: np.ndarray = self.index.tokens[samples] + self.image_cost * self.index.images[samples]
        return cost
