"""Samples that are pieces of one large file: the driver knows where each lies, the tasks read them.

So a file of any size is listed in the memory of three numbers a sample, and a task takes with it the numbers of
its own samples only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np

from components.contract.store import Store, StoreError, check_key, open_store
from llava.errors import RefusedInput

LONGEST = 64 * 2**20  # bytes of one piece: a file without line ends is no list of samples
_WINDOW = 8 * 2**20  # bytes read at once
_GAP = 64 * 2**10  # bytes that are cheaper read than asked around


class File(NamedTuple):
    """A file as it was when it was listed."""

    store: Store
    key: str
    size: int
    version: str

    @classmethod
    def at(cls, store: Store, key: str) -> File:
        """The file as it is now; RefusedInput where there is none."""
        stat = store.stat(key)
        if stat is None:
            raise RefusedInput(f"{store.uri}/{key} does not exist")
        return cls(store, key, stat.size, stat.version)

    def __str__(self) -> str:
        return f"{self.store.uri}/{self.key}"


def read_at(file: File, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on; StoreError where it has become shorter."""
    store, key = file.store, file.key
    if store.local_path is not None:
        with store.open(key) as opened:
            data: bytes = opened.read_at(size, start)
    else:
        data = _remote(store.uri, check_key(key), file.version).read_at(size, start)
    if len(data) != size:
        raise StoreError(
            f"{file}: {size:,} bytes expected at {start:,}, found {len(data):,}: the file changed; run again"
        )
    return data


@lru_cache(16)
def _remote(uri: str, key: str, version: str) -> Any:
    system, base = open_store(uri).arrow()
    return system.open_input_file(f"{base}/{key}")


class RecordIndex(Sequence[tuple[int, bytes]]):
    """(number in the file, bytes) of each piece; reading them in turn takes few ranged reads."""

    def __init__(self, file: File, numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        """All arrays: (n,) int64."""
        self.file = file
        self.numbers, self.starts, self.sizes = numbers, starts, sizes

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, which: int) -> tuple[int, bytes]: ...

    @overload
    def __getitem__(self, which: slice) -> RecordIndex: ...

    def __getitem__(self, which: int | slice) -> tuple[int, bytes] | RecordIndex:
        if isinstance(which, slice):
            parts = (part[which].copy() for part in (self.numbers, self.starts, self.sizes))
            return RecordIndex(self.file, *parts)
        data = read_at(self.file, int(self.starts[which]), int(self.sizes[which]))
        return int(self.numbers[which]), data

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        windows = np.cumsum(self.sizes) // _WINDOW
        edges = [0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(self)]
        for first, last in pairwise(edges):
            yield from self._window(range(first, last))

    def _window(self, which: range) -> Iterator[tuple[int, bytes]]:
        runs: list[tuple[int, int]] = []
        found: dict[int, int] = {}
        for one in sorted(which, key=lambda one: int(self.starts[one])):
            start, end = int(self.starts[one]), int(self.starts[one] + self.sizes[one])
            if runs and start <= runs[-1][1] + _GAP:
                runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
            else:
                runs.append((start, end))
            found[one] = len(runs) - 1
        data = [read_at(self.file, start, end - start) for start, end in runs]
        for one in which:
            offset = int(self.starts[one]) - runs[found[one]][0]
            yield int(self.numbers[one]), data[found[one]][offset : offset + int(self.sizes[one])]


def lines(file: File) -> RecordIndex:
    """The lines of a text file that hold more than a line's end; the number of a line counts all of them."""
    starts, ends, at = [np.zeros(1, np.int64)], [], 0
    for chunk in file.store.chunks(file.key):
        found = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at
        ends.append(found)
        starts.append(found + 1)
        at += len(chunk)
    ends.append(np.array([at]))
    first, sizes = np.concatenate(starts), np.concatenate(ends) - np.concatenate(starts)
    if len(sizes) and sizes.max() > LONGEST:
        line = int(sizes.argmax())
        raise RefusedInput(
            f"{file}: line {line + 1:,} has {sizes[line]:,} bytes, limit {LONGEST:,}: no list of samples"
        )
    numbers = np.flatnonzero(sizes > 1)
    return RecordIndex(file, numbers, first[numbers], sizes[numbers])
