"""Drops: folders of new instruction data, as they come in beside a root.

A drop prefix is a folder or `s3://bucket/prefix`; each folder right under it is one drop: LLaVA-format JSON or JSONL
and its pictures. A drop is finished when `_READY` stands in it and its files no longer change. It is known by the
digest of its files (path, size, ETag or time of change); the root keeps a record of each that was taken, at
`drops/DIGEST.json`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pydantic
from pydantic import Field

from components.contract import Digest, Entry, Line, Store, open_store, sha256_of
from llava.errors import RefusedInput

READY = "_READY"
RECORDS = "drops"
SETTLE_S = 2.0


class Drop(pydantic.BaseModel):
    """One finished drop."""

    model_config = pydantic.ConfigDict(frozen=True)

    uri: Line
    digest: Digest
    """Of its files: the same drop has the same digest wherever it is looked at."""
    files: int = Field(ge=0)
    size: int = Field(ge=0)
    """Bytes."""


@dataclass(frozen=True)
class Looked:
    """What a look at the prefixes found."""

    new: list[Drop]
    waiting: list[str]
    """Drops that are still being written, by URI."""
    empty: list[str]
    """Prefixes under which nothing at all lies: nothing has come in yet, or the prefix is mistyped."""


def look(root: str, prefixes: Sequence[str], settle: float = SETTLE_S) -> Looked:
    """The finished drops under `prefixes` that `root` has no record of; `settle`: seconds between two listings.

    Raises RefusedInput for a folder that does not exist and a URI that is neither a folder nor s3://, StoreError
    where a store is away.
    """
    records = open_store(root)
    new: list[Drop] = []
    waiting: list[str] = []
    empty: list[str] = []
    for prefix in prefixes:
        store = open_store(prefix)
        if store.local_path is not None and not store.local_path.is_dir():
            raise RefusedInput(
                f"--drop {prefix}: there is no folder {store.uri}; correct the path, or make the folder"
            )
        found = _folders(store)
        if not found and next(iter(store.list()), None) is None:
            empty.append(store.uri)
        waiting += [f"{store.uri}/{name}" for name, files in found.items() if not _is_marked(files)]
        candidates = {
            name: drop
            for name, files in found.items()
            if _is_marked(files)
            and records.stat(_record(drop := _drop(f"{store.uri}/{name}", files))) is None
        }
        if candidates:
            time.sleep(settle)
            again = _folders(store)
        for name, drop in candidates.items():
            if _drop(drop.uri, again.get(name, [])) == drop:
                new.append(drop)
            else:
                waiting.append(drop.uri)
    return Looked(new, waiting, empty)


def pending(root: str, prefixes: Sequence[str], settle: float = SETTLE_S) -> list[Drop]:
    """The new drops of `look`."""
    return look(root, prefixes, settle).new


def take(root: str, drop: Drop, note: dict[str, object]) -> bool:
    """Record under `root` that `drop` was taken, with what became of it; False where that is recorded already."""
    record = {"uri": drop.uri, "files": drop.files, "size": drop.size, "taken": datetime.now(UTC).isoformat()}
    return open_store(root).create(_record(drop), json.dumps(record | note, indent=1).encode())


def _record(drop: Drop) -> str:
    return f"{RECORDS}/{drop.digest}.json"


def _folders(store: Store) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in store.list():
        name, slash, _ = entry.key.partition("/")
        if slash:
            found.setdefault(name, []).append(entry)
    return found


def _is_marked(files: list[Entry]) -> bool:
    return any(entry.key.partition("/")[2] == READY for entry in files)


def _drop(uri: str, files: list[Entry]) -> Drop:
    lines = sorted((entry.key.partition("/")[2], entry.size, entry.version) for entry in files)
    size = sum(entry.size for entry in files)
    return Drop(uri=uri, digest=sha256_of(lines), files=len(files), size=size)
