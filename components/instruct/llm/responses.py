"""Every response, stored before it is read: small Parquet files under the artifact, found again by request digest.

`responses/FIRST-LAST-NAME.parquet` holds responses about photos of the shards FIRST to LAST. A file is written whole
and never changed; a writer folds its small files into a larger one now and then (written first, the small ones deleted
after it), so a crash leaves a response twice at worst.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.chat import MOST_TOKENS
from components.contract import Folder
from components.instruct.llm.limits import Tokens
from llava.data.parquet_files import damage_told, read_parquet
from llava.errors import RefusedInput

RESPONSES = "responses"
ANSWERED = 200
"""The status of a response that is never asked for again."""
GATHER_SECONDS = 0.02
"""Answers that come within this time share a file: a file for each would cost more than the answer's own handling."""
FOLD = 200
"""Small files that are folded into one."""
ADOPT = 2000
"""Responses of a file that takes over what another artifact paid for."""

SCHEMA = pa.schema(
    [
        pa.field("digest", pa.string()),
        pa.field("photo", pa.string()),
        pa.field("type", pa.string()),
        pa.field("shard", pa.int32()),
        pa.field("status", pa.int32()),
        pa.field("body", pa.string()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
        pa.field("seconds", pa.float32()),
    ]
)
_KEY = re.compile(rf"(?:.*/)?{RESPONSES}/(\d+)-(\d+)-[0-9a-f]+\.parquet")


class Response(NamedTuple):
    """What an endpoint said to one request: HTTP status, body as it came, tokens as it counted them, seconds."""

    digest: str
    photo: str
    type: str
    shard: int
    status: int
    body: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def tokens(self) -> Tokens:
        """What was paid for."""
        return Tokens(self.prompt_tokens, self.completion_tokens)


class Stored(NamedTuple):
    """What an artifact has stored: the digests, and the tokens that they took."""

    digests: set[bytes]
    tokens: Tokens


def stored(folder: Folder) -> Stored:
    """Digests and tokens of every answer in the artifact `folder`; what the endpoint refused may be asked again."""
    digests: set[bytes] = set()
    tokens = Tokens()
    columns = ("digest", "status", "prompt_tokens", "completion_tokens")
    for rows in _files(lambda: _keys(folder), folder, columns):
        for digest, status, prompt, completion in rows:
            if status == ANSWERED and (found := bytes.fromhex(digest)) not in digests:
                digests.add(found)
                tokens += Tokens(prompt, completion)
    return Stored(digests, tokens)


def responses_of(folder: Folder, shard: int) -> dict[str, Response]:
    """The responses about one shard's photos, by digest: the answer, where a refused request was asked again."""

    def keys() -> Iterator[str]:
        for key in _keys(folder):
            first, last = map(int, _KEY.fullmatch(key).groups())  # type: ignore[union-attr]
            if first <= shard <= last:
                yield key

    found: dict[str, Response] = {}
    for rows in _files(keys, folder, Response._fields):
        for one in map(Response._make, rows):
            if one.shard == shard and (one.status == ANSWERED or one.digest not in found):
                found[one.digest] = one
    return found


def any_stored(artifacts: Folder) -> bool:
    """Whether any artifact in the folder has responses stored."""
    return any(_KEY.fullmatch(entry.key) for entry in artifacts.list())


def adopt(artifacts: Folder, folder: Folder, missing: Mapping[bytes, int], check: Callable[[], None]) -> int:
    """Copy into `folder` what other artifacts beside it have answered of `missing` (digest -> shard); how many.

    `check` is called before a file is written and may raise.
    """
    wanted = dict(missing)
    taken: list[Response] = []
    own = f"{folder.uri}/"

    def keys() -> Iterator[str]:
        for entry in artifacts.list():
            if _KEY.fullmatch(entry.key) and not f"{artifacts.uri}/{entry.key}".startswith(own):
                yield entry.key

    for rows in _files(keys, artifacts, Response._fields):
        for one in map(Response._make, rows):
            if one.status == ANSWERED and (shard := wanted.pop(bytes.fromhex(one.digest), None)) is not None:
                taken.append(one._replace(shard=shard))
    taken.sort(key=lambda one: (one.shard, one.digest))
    for start in range(0, len(taken), ADOPT):
        check()
        _write(folder, taken[start : start + ADOPT])
    return len(taken)


class Writer:
    """Stores responses as they come, several in one file; use it as `async with`."""

    def __init__(self, folder: Folder, check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        self._waiting: list[tuple[Response, asyncio.Future[None]]] = []
        self._come = asyncio.Event()
        self._small: list[tuple[str, list[Response]]] = []
        self._task: asyncio.Task[None] | None = None

    async def put(self, response: Response) -> None:
        """Return when the response is stored, safe from any crash of this process."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((response, done))
        self._come.set()
        await done

    async def __aenter__(self) -> Writer:
        self._task = asyncio.create_task(self._store_for_ever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _store_for_ever(self) -> None:
        while True:
            await self._come.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._come.clear()
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._store, [response for response, _ in batch])
            except Exception as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)

    def _store(self, responses: list[Response]) -> None:
        self._check()
        self._small.append((_write(self._folder, responses), responses))
        if len(self._small) >= FOLD:
            _write(self._folder, [one for _, part in self._small for one in part])
            for key, _ in self._small:
                self._folder.delete(key)
            self._small = []


def _keys(folder: Folder) -> list[str]:
    return [entry.key for entry in folder.list(f"{RESPONSES}/") if _KEY.fullmatch(entry.key)]


def _write(folder: Folder, responses: Sequence[Response]) -> str:
    columns = dict(zip(Response._fields, zip(*responses, strict=True), strict=True))
    table = pa.table({name: list(values) for name, values in columns.items()}, schema=SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    shards: Collection[int] = columns["shard"]
    key = f"{RESPONSES}/{min(shards):05d}-{max(shards):05d}-{uuid4().hex[:16]}.parquet"
    folder.write(key, sink.getvalue())
    return key


def _files(
    keys: Callable[[], Iterable[str]], folder: Folder, names: Sequence[str]
) -> Iterator[Iterator[tuple[Any, ...]]]:
    """The rows of every file among `keys()`, each file once; what was folded since it was listed is looked for anew."""
    seen: set[str] = set()
    gone: set[str] = set()
    while True:
        for key in [key for key in keys() if key not in seen]:
            try:
                table = read_parquet(folder.read(key), f"{folder.uri}/{key}", list(names))
            except FileNotFoundError:
                if key in gone:  # and still listed
                    raise
                gone.add(key)
                break
            seen.add(key)
            yield zip(*_columns(table, names, f"{folder.uri}/{key}"), strict=True)
        else:
            return


def _columns(table: pa.Table, names: Sequence[str], where: str) -> list[list[Any]]:
    """The values. RefusedInput for what no `Writer` wrote: tokens are summed and held against a budget."""
    sound = sorted(table.column_names) == sorted(names) and all(
        table.schema.field(name).type == SCHEMA.field(name).type and not table[name].null_count
        for name in names
    )
    if sound:
        counts = [pc.min_max(table[name]).as_py() for name in names if name.endswith("_tokens")]
        sound = all((one["min"] or 0) >= 0 and (one["max"] or 0) <= MOST_TOKENS for one in counts)
    if not sound or pc.all(pc.match_substring_regex(table["digest"], "^([0-9a-f]{2})+$")).as_py() is False:
        raise RefusedInput(
            f"{where}: no responses that can be read again; delete the file to have them asked anew"
        )
    with damage_told(where):
        return [table[name].to_pylist() for name in names]
