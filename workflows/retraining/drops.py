"""Drops: folders of new instruction data, as they come in beside a root.

A drop prefix is a folder or `s3://bucket/prefix`; each folder right under it is one drop: LLaVA-format JSON or JSONL
and its pictures. A drop is finished when `_READY` stands in it and its files no longer change. It is known by the
digest of its files (path, size, ETag or time of change). Whoever may put a drop there may put anything there: a link is
never followed, and only regular files are read. The root keeps a record of each that was taken, at
`drops/DIGEST.json`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pydantic
from pydantic import Field

from components.contract import (
    DataFolder,
    Digest,
    Entry,
    Line,
    Links,
    Refusal,
    Store,
    open_data_store,
    open_store,
    sha256_of,
)
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
    refused: list[Refusal] = field(default_factory=list)
    """Links and the like beside the drops, by URI: none of them is a drop."""
    empty: list[str] = field(default_factory=list)
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
    refused: list[Refusal] = []
    for prefix in prefixes:
        store = open_drops(prefix)
        if store.local_path is not None and not store.local_path.is_dir():
            raise RefusedInput(
                f"--drop {prefix}: there is no folder {store.uri}; correct the path, or make the folder"
            )
        found = _folders(store)
        beside = [one._replace(key=f"{store.uri}/{one.key}") for one in store.refused() if "/" not in one.key]
        refused += beside
        if not found and not beside and next(iter(store.list()), None) is None:
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
    return Looked(new, waiting, refused, empty)


def pending(root: str, prefixes: Sequence[str], settle: float = SETTLE_S) -> list[Drop]:
    """The new drops of `look`."""
    return look(root, prefixes, settle).new


def take(root: str, drop: Drop, note: dict[str, object]) -> bool:
    """Record under `root` that `drop` was taken, with what became of it; False where that is recorded already."""
    record = {"uri": drop.uri, "files": drop.files, "size": drop.size, "taken": datetime.now(UTC).isoformat()}
    return open_store(root).create(_record(drop), json.dumps(record | note, indent=1).encode())


def open_drops(prefix: str) -> Store:
    """The place of drops that the operator names, which may be a link; nothing in it is followed."""
    here = open_store(prefix).local_path
    return open_store(prefix) if here is None else DataFolder(here, Links.NONE)


def open_drop(uri: str) -> Store:
    """A drop's files; neither the drop itself nor anything in it may be a link."""
    return open_data_store(uri, follow_links=False)


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
