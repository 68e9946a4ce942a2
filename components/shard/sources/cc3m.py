"""Source `cc3m`: a TSV of caption and URL (Conceptual Captions, and every list like it), fetched here.

What `components/shard/download.py` brings is kept beside the unfinished shard, a few seconds' worth at a time, so that
a crash costs little and no server is asked twice. What is kept goes when the shard is finished. Links that are dead
are refused samples under their reason; a third of CC3M is, so set `shard.max_bad` to what you expect.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple
from uuid import uuid4

import pyarrow as pa

from components.contract.store import Store, StoreError
from components.shard.download import NO_ANSWER, Downloader, Fetched, host_of
from components.shard.source_settings import SourceSettings
from components.shard.sources.base import (
    DataSource,
    Listing,
    Loaded,
    Outcome,
    RefusedSample,
    ahead,
    files_of,
    one_file,
    open_data,
    plain,
    split_by_hash,
)
from components.shard.sources.photos import admit, resized
from components.shard.sources.record_index import File, lines, read_at
from llava.data.schema import Row

KEEP_EVERY_SECONDS = 5.0
_KEEP_ROWS, _KEEP_BYTES = 64, 8 * 2**20
_HOSTS_TO_JUDGE_BY = 3
_NO_SIGN = (*NO_ANSWER, "url", "private-address")  # reasons that do not show that the network works
_WITNESSES = 16
_LOOK = 16 * 2**10  # bytes of the list in which a link of another host is looked for
_KEPT = pa.schema(
    [("url", pa.binary()), ("data", pa.binary()), ("reason", pa.string()), ("detail", pa.string())]
)


class Link(NamedTuple):
    """One line: the sample's name, which is the line's number from 0, its caption and where its picture lies."""

    name: str
    caption: str
    url: str


def check(settings: SourceSettings) -> tuple[Store, str]:
    """The data folder and the TSV in it; RefusedInput where there is none, or several."""
    store = open_data(settings)
    return store, one_file(store, "captions", settings.captions, ".tsv")


def listing(settings: SourceSettings) -> Listing:
    """The lines, unread: the tasks read theirs."""
    file = File.at(*check(settings))
    return Listing(lines(file), file)


def rows(
    settings: SourceSettings, shared: File, items: Sequence[tuple[int, bytes]], kept: Store
) -> Iterator[Outcome]:
    """Fetch what is not kept yet, then give the rows in the order of the lines."""
    links = [_link(number, line) for number, line in items]
    with Kept(kept) as found:
        asyncio.run(_fetch(settings, shared, [link.url for link in links if isinstance(link, Link)], found))

        def load(link: Link | RefusedSample) -> Loaded:
            if isinstance(link, RefusedSample):
                raise link
            return _load(settings, link, found.get(link.url))

        yield from ahead(load, links)


def _link(number: int, line: bytes) -> Link | RefusedSample:
    name = f"{number:09d}"
    parts = line.decode("utf-8", "surrogateescape").rstrip("\r\n").split("\t")
    if len(parts) < 2:
        return RefusedSample(name, "no-row", "the line is no caption, tab, URL")
    return Link(name, plain(parts[0]), parts[1].strip())


def _load(settings: SourceSettings, link: Link, fetched: Fetched) -> Loaded:
    if fetched.data is None:
        raise RefusedSample(link.name, fetched.reason, f"{link.url}: {fetched.detail or fetched.reason}")
    if not link.caption:
        raise RefusedSample(link.name, "no-caption", "the line has no caption")
    photo = admit(settings, link.name, link.name, fetched.data)
    row: Row = {
        "id": link.name,
        "image": photo.image,
        "width": photo.size.width,
        "height": photo.size.height,
        "captions": [link.caption],
    }
    return Loaded(split_by_hash(settings, link.url), row, resized(photo))


async def _fetch(settings: SourceSettings, file: File, urls: list[str], kept: Kept) -> None:
    """Everything at once, as far as the limits allow; StoreError where nobody in the world answers."""
    wanted = [url for url in dict.fromkeys(urls) if url not in kept]
    if not wanted:
        return
    async with Downloader(
        settings.download, max_bytes=settings.max_image_bytes, allow_private=settings.allow_private
    ) as downloader:

        async def one(url: str) -> None:
            kept.add(url, await downloader.fetch(url))
            if kept.is_due:
                await asyncio.to_thread(kept.flush)

        async def now_and_then() -> None:
            while True:
                await asyncio.sleep(KEEP_EVERY_SECONDS)
                await asyncio.to_thread(kept.flush)

        keeper = asyncio.create_task(now_and_then())
        try:
            await asyncio.gather(*(one(url) for url in wanted))
        finally:
            keeper.cancel()
        await asyncio.to_thread(kept.flush)
        hosts = _silent(wanted, kept)
        if len(hosts) < _HOSTS_TO_JUDGE_BY:
            return

        async def ask(url: str) -> str:
            return (await downloader.fetch(url)).reason

        answers = await asyncio.gather(*map(ask, _witnesses(file, urls, kept, hosts)))
    if all(reason in _NO_SIGN for reason in answers):
        asked = len(hosts) + sum(reason in NO_ANSWER for reason in answers)
        first = next(url for url in wanted if kept.reason(url) in NO_ANSWER)
        raise StoreError(
            f"not one of {asked} hosts answered ({first}: {kept.get(first).detail}): is this machine online? "
            "Run again when it is; what was fetched before is kept"
        )


def _silent(urls: list[str], kept: Kept) -> set[str | None]:
    """The hosts that gave no answer; none where any host gave one."""
    if any(kept.reason(url) not in _NO_SIGN for url in urls):
        return set()
    return {host_of(url) for url in urls if kept.reason(url) in NO_ANSWER}


def _witnesses(file: File, urls: list[str], kept: Kept, silent: set[str | None]) -> list[str]:
    """Links of different hosts to ask whether the network works: any shard may be left with dead ones alone.

    Those of this shard that were answered in an earlier try, and some from all over the list.
    """
    answered = {host_of(url): url for url in urls if kept.reason(url) not in _NO_SIGN}
    found = dict(list(answered.items())[:_WITNESSES])
    for start in range(0, file.size, max(1, file.size // _WITNESSES)):
        data = read_at(file, start, min(_LOOK, file.size - start))
        whole = data[: data.rfind(b"\n") + 1].split(b"\n")[1 if start else 0 :]
        for link in (_link(0, line) for line in whole):
            host = host_of(link.url) if isinstance(link, Link) else None
            if isinstance(link, Link) and host is not None and host not in silent and host not in found:
                found[host] = link.url
                break
    return list(found.values())


class Kept:
    """What was fetched: in a local file for this task, and in segments in a store for the next try.

    No answer at all is not kept: it may lie with this machine, and is asked for again. So what an unfinished shard
    has left may be dead links alone.
    """

    def __init__(self, store: Store) -> None:
        """Read the segments that an earlier try left; a damaged one counts as not there."""
        self._store, self._lock = store, Lock()
        self._spool = tempfile.TemporaryFile(prefix="llava-fetched-")  # noqa: SIM115 - closed by __exit__
        self._found: dict[bytes, tuple[int, int, str, str]] = {}
        self._pending: list[dict[str, object]] = []
        self._pending_bytes = 0
        for entry in store.list():
            try:
                table = pa.ipc.open_stream(store.read(entry.key)).read_all()
            except pa.ArrowInvalid:
                continue
            for cells in table.to_pylist():
                self._put(cells["url"], Fetched(cells["data"], cells["reason"], cells["detail"]))

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def __contains__(self, url: str) -> bool:
        return _key(url) in self._found

    def add(self, url: str, fetched: Fetched) -> None:
        """Take in the result for `url`."""
        key = _key(url)
        with self._lock:
            self._put(key, fetched)
            if fetched.reason not in NO_ANSWER:
                told = _encodable(fetched.detail)
                self._pending.append({"url": key, **fetched._replace(detail=told)._asdict()})
                self._pending_bytes += len(fetched.data or b"")

    @property
    def is_due(self) -> bool:
        """Whether enough has come in to write a segment."""
        return len(self._pending) >= _KEEP_ROWS or self._pending_bytes >= _KEEP_BYTES

    def flush(self) -> None:
        """Write what came in since the last time."""
        with self._lock:
            segment, self._pending, self._pending_bytes = self._pending, [], 0
        if segment:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, _KEPT) as writer:
                writer.write_table(pa.Table.from_pylist(segment, schema=_KEPT))
            self._store.write(f"{uuid4().hex}.arrow", sink.getvalue().to_pybytes())

    def reason(self, url: str) -> str:
        """Why there is nothing for `url`, which must have been added; "" where there is."""
        return self._found[_key(url)][2]

    def get(self, url: str) -> Fetched:
        """The result for `url`, which must have been added."""
        start, size, reason, detail = self._found[_key(url)]
        data = None if size < 0 else os.pread(self._spool.fileno(), size, start)
        return Fetched(data, reason, detail)

    def _put(self, key: bytes, fetched: Fetched) -> None:
        start, size = self._spool.tell(), -1
        if fetched.data is not None:
            size = self._spool.write(fetched.data)
            self._spool.flush()
        self._found[key] = (start, size, fetched.reason, fetched.detail)


def _key(url: str) -> bytes:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def made_of(settings: SourceSettings, shared: File, items: Sequence[tuple[int, bytes]]) -> Iterable[object]:
    """The lines and their numbers: what was fetched for a line once is not fetched again."""
    return items


SOURCE = DataSource(
    files_of,
    check,
    listing,
    rows,
    made_of,
    about="a TSV of captions and URLs",
    takes=("allow_private",),
)
