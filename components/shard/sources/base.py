"""What a source is: it lists its samples cheaply on the driver, and gives their rows wherever a task runs."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from components.contract.digest import fingerprint
from components.contract.store import Refusal, Store, links_of, open_data_store
from components.shard.source_settings import SourceSettings
from llava.data.schema import Row
from llava.errors import LlavaError, RefusedInput

NEVER = np.uint64(2**64 - 1)
READ_AHEAD = 4  # photos read at once in a task: hides a store's answer time
_LONGEST_NAME = 200


class RefusedSample(LlavaError):
    """A sample that is left out: its `name`, a short `reason` to count by, and the text for people.

    Name and text are shortened and made printable: both may come from hostile data.
    """

    def __init__(self, name: str, reason: str, text: str) -> None:
        super().__init__(_printable(text, 2 * _LONGEST_NAME))
        self.name, self.reason = _printable(name, _LONGEST_NAME), reason


@dataclass
class Listing:
    """The samples of a source in a fixed order, without their pixels; slices of `items` go to the tasks.

    `items` may be a lazy sequence (see `record_index.py`). `shared`: what all samples share. `counts`: what the list
    itself left out (boxes of crowds, say). `sizes`: how many samples each item holds, where an item is a file or
    a part of one; None: one each. `exact`: False where `sizes` is an estimate. `marks`: (n,) uint64, a hash of each
    item's name, or `NEVER` where no shard may begin; None where items are only ever added at the end. `refused`: files
    of samples that are not read, each counted as one refused sample.
    """

    items: Sequence[Any]
    shared: Any = None
    counts: dict[str, int] = field(default_factory=dict)
    sizes: Sequence[int] | None = None
    exact: bool = True
    marks: np.ndarray | None = None
    refused: Sequence[Refusal] = ()

    def shards(self, rows: int) -> Iterator[tuple[Sequence[Any], int]]:
        """The items cut into runs of at most `rows` samples, each with its number of samples.

        An item that alone holds more is a shard of its own. With `marks` a shard holds at least half of `rows`
        and ends before the item with the least mark: where a shard begins is a matter of the items around it, so
        that items added in one place change the shards of that place only.
        """
        count = len(self.items)
        ends = np.cumsum(np.ones(count, np.int64) if self.sizes is None else np.asarray(self.sizes, np.int64))
        start = held = 0
        while start < count:
            end = max(start + 1, int(np.searchsorted(ends, held + rows, "right")))
            if self.marks is not None and end < count:
                half = max(start + 1, int(np.searchsorted(ends, held + rows / 2)) + 1)
                if half <= end:
                    end = half + int(np.argmin(self.marks[half : end + 1]))
            yield self.items[start:end], int(ends[end - 1]) - held
            start, held = end, int(ends[end - 1])


class Loaded(NamedTuple):
    """A sample with its pixels: the split, the row, and names of what is to be counted about it."""

    split: str
    row: Row
    counts: tuple[str, ...] = ()


Outcome = Loaded | RefusedSample
Load = Callable[[SourceSettings, Any, Any], Loaded]


@dataclass(frozen=True)
class DataSource:
    """Five functions, and what the settings ask about a source.

    `external` gives fingerprints; `check` raises RefusedInput, cheaply, where the data's files are not found;
    `listing` lists the samples; `rows(settings, shared, items, kept)` gives one outcome for each sample of the
    items, in their order. `kept` is a store that outlives a crash of the task, for what is costly to fetch again.
    `made_of(settings, shared, items)` gives what these rows come from: names, texts, versions of photos. Items that
    give the same again are not read again (`components/datasets/reuse.py`).
    """

    external: Callable[[SourceSettings], dict[str, str]]
    check: Callable[[SourceSettings], Any]
    listing: Callable[[SourceSettings], Listing]
    rows: Callable[[SourceSettings, Any, Sequence[Any], Store], Iterator[Outcome]]
    made_of: Callable[[SourceSettings, Any, Sequence[Any]], Iterable[object]]
    about: str
    """What it reads, in a few words: the help of `shard.source`."""
    needs: Mapping[str, str] = field(default_factory=lambda: {"path": "the folder that holds the data"})
    """Settings that must be given, and what each is."""
    takes: tuple[str, ...] = ()
    """Settings that may be given for some sources only, this one among them."""

    @property
    def own(self) -> set[str]:
        """Settings that are refused where neither this source nor another one that has them is chosen."""
        return {*self.needs, *self.takes}


def each(load: Load) -> Callable[[SourceSettings, Any, Sequence[Any], Store], Iterator[Outcome]]:
    """The `rows` of a source whose items are its samples: `load` gives one or raises RefusedSample."""

    def rows(settings: SourceSettings, shared: Any, items: Sequence[Any], kept: Store) -> Iterator[Outcome]:
        return ahead(lambda item: load(settings, shared, item), items)

    return rows


def ahead(load: Callable[[Any], Loaded], items: Iterable[Any]) -> Iterator[Outcome]:
    """`map` in order with a few calls ahead, so that memory holds a few samples only."""

    def outcome(item: Any) -> Outcome:
        try:
            return load(item)
        except RefusedSample as refused:
            return refused

    waiting: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for item in items:
            waiting.append(pool.submit(outcome, item))
            if len(waiting) > 2 * READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def mark(name: str) -> int:
    """A hash of 64 bits, less than `NEVER`."""
    data = name.encode("utf-8", "surrogatepass")
    return min(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"), int(NEVER) - 1)


def open_data(settings: SourceSettings) -> Store:
    """The data folder; RefusedInput where nothing lies there."""
    assert settings.path is not None
    store = open_data_store(settings.path, settings.follow_links)
    here = store.local_path
    if not here.is_dir() if here is not None else next(store.list(), None) is None:
        raise RefusedInput(f"shard.path={settings.path}: no such folder ({store.uri})")
    return store


def files_of(settings: SourceSettings) -> dict[str, str]:
    """The fingerprint of the data folder."""
    return {settings.source: fingerprint(open_data(settings).uri, links_of(settings.follow_links))}


def left_out(refused: Sequence[Refusal]) -> str:
    """What a folder holds and nobody reads, for a message: "" for nothing."""
    if not refused:
        return ""
    reasons = Counter(one.reason for one in refused)
    told = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
    return f" (left out: {told}, such as {_printable(refused[0].text, 2 * _LONGEST_NAME)})"


def one_file(store: Store, setting: str, named: str | None, *suffixes: str) -> str:
    """The file that the setting names, or the only one with such a suffix at the top of the data folder."""
    if named is None:
        keys = [entry.key for entry in store.list() if "/" not in entry.key and entry.key.endswith(suffixes)]
        if len(keys) != 1:
            found = f"it holds several: {', '.join(keys)}" if keys else "it holds none"
            raise RefusedInput(
                f"shard.path={store.uri}: which {setting} file? {found}{left_out(store.refused())}; "
                f"name it in shard.{setting}"
            )
        return keys[0]
    if store.stat(named) is None:
        raise RefusedInput(f"shard.{setting}={named}: {store.uri}/{named} does not exist")
    return named


def split_by_hash(settings: SourceSettings, name: str) -> str:
    """The split of a photo, from its name and the seed alone: more data later never moves it."""
    digest = hashlib.sha256(f"{settings.seed}:{name}".encode(errors="surrogatepass")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < settings.heldout else "train"


def split_by_bytes(settings: SourceSettings, data: bytes) -> str:
    """The split of a photo whose name says nothing: from its bytes and the seed."""
    return split_by_hash(settings, hashlib.sha256(data).hexdigest())


def plain(text: str) -> str:
    """The text on one line, with single spaces."""
    return " ".join(text.split())


def _printable(text: str, most: int) -> str:
    shown = text[: most + 1].encode("utf-8", "replace").decode()
    shown = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in shown)
    return shown[:most] + "…" if len(shown) > most else shown
