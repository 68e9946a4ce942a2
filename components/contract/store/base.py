"""What every store can do: keys and bytes under one prefix, create-only writes, compare and swap."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from llava.errors import LlavaError, RefusedInput

_COPIES_AT_ONCE = 16
# A name that begins like this is a store's own scratch file: never listed, never a key.
SCRATCH = ".~"


class StoreError(LlavaError):
    """A store did not do what it was asked; the message names the URI."""


@dataclass(frozen=True)
class Stat:
    """Size in bytes and version (changes with every write) of one key."""

    size: int
    version: str


@dataclass(frozen=True)
class Entry:
    """One listed key, relative to the store, with its size in bytes and its version."""

    key: str
    size: int
    version: str


class Refusal(NamedTuple):
    """Something in a folder that is not listed: its name, a short reason to count by, a text for people."""

    key: str
    reason: str
    text: str


def check_key(key: str) -> str:
    """Return `key` if it is a plain relative path that stays under its prefix, else raise RefusedInput."""
    parts = key.split("/")
    if (
        not key
        or not is_text(key)
        or "\0" in key
        or "\\" in key
        or any(p in ("", ".", "..") or p.startswith(SCRATCH) for p in parts)
    ):
        raise RefusedInput(
            f"key {key!r}: must be a relative path of plain names, such as train/part-00000.parquet"
        )
    return key


def is_text(key: str) -> bool:
    """Whether the name is UTF-8; other names of files hold lone surrogates."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


class Store(ABC):
    """Keys and bytes under one URI. Small, picklable, safe to use from several threads and processes.

    Keys are relative paths with "/" between the names. A missing key is FileNotFoundError on reading.
    """

    uri: str

    def read(self, key: str) -> bytes:
        """The bytes of `key`; FileNotFoundError if there is none."""
        found = self.fetch(key)
        if found is None:
            raise FileNotFoundError(f"{self.uri}/{key} does not exist")
        return found[0]

    @abstractmethod
    def fetch(self, key: str, most: int | None = None) -> tuple[bytes, str] | None:
        """Bytes and version of `key` as of one moment (what `swap` needs), or None.

        Raises RefusedInput where there are more than `most` bytes, before they are read.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write `key` whole or not at all, over what stands there."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write `key` only if it does not exist; False if it does. Of many racers exactly one gets True."""

    @abstractmethod
    def swap(self, key: str, data: bytes, version: str) -> bool:
        """Write `key` only if its version still is `version`; False if it changed or is gone."""

    @abstractmethod
    def stat(self, key: str) -> Stat | None:
        """Size and version of `key`, or None."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every key that begins with `prefix`, as S3 means it ("a" finds "ab" and "a/b"), in order."""

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """The names of the folders right under the store, sorted; nothing below them is listed."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete `key`; nothing happens if it does not exist."""

    @abstractmethod
    def delete_all(self, prefix: str = "") -> None:
        """Delete all inside the folder `prefix` ("a" means "a/..." and not "ab"); "" is the whole store."""

    @abstractmethod
    def upload(self, path: Path | str, key: str) -> None:
        """Store the local file `path` as `key`, whole or not at all."""

    @abstractmethod
    def download(self, key: str, path: Path | str) -> None:
        """Write `key` into the local file `path`, whole or not at all; folders above it are made."""

    @abstractmethod
    def copy(self, source: Store, key: str, to: str) -> None:
        """Store what `source`, a store of the same kind, holds as `key` under the key `to`, whole or not at all.

        The bytes do not pass through this machine; in a folder both are one file where the file system can do that.
        FileNotFoundError if there is no such key.
        """

    @abstractmethod
    def chunks(self, key: str, size: int = 8 << 20) -> Iterator[bytes]:
        """The bytes of `key` piece by piece, for files larger than memory."""

    @abstractmethod
    def sub(self, prefix: str) -> Store:
        """The store for the folder `prefix` inside this one."""

    @abstractmethod
    def arrow(self) -> tuple[Any, str]:
        """(pyarrow.fs.FileSystem, base path): what pyarrow needs to read and write under this store."""

    @property
    def local_path(self) -> Path | None:
        """Where the store's files lie on this machine, or None if they do not."""
        return None

    def open(self, key: str) -> Any:
        """pyarrow's file to read `key` from, at any place; close it. FileNotFoundError if there is none."""
        system, base = self.arrow()
        return system.open_input_file(f"{base}/{check_key(key)}")

    def refused(self, prefix: str = "") -> Sequence[Refusal]:
        """What lies under `prefix` and is not listed."""
        return ()

    def sha256(self, key: str) -> str:
        """Hex sha256 of the bytes of `key`."""
        digest = hashlib.sha256()
        for chunk in self.chunks(key):
            digest.update(chunk)
        return digest.hexdigest()

    def probe(self) -> None:
        """Write, and write again create-only, within seconds; RefusedInput if the store cannot."""
        self._probe_with(self)

    def _probe_with(self, store: Store) -> None:
        key = f"probe-{uuid4().hex}"
        store.create(key, b"llava")
        overwritten = store.create(key, b"llava")
        store.delete(key)
        if overwritten:
            raise RefusedInput(
                f"{self.uri}: the store ignores create-only writes (If-None-Match), on which finished "
                "artifacts rest; use a store that honours conditional writes"
            )

    def copy_all(self, source: Store, keys: Sequence[str], check: Callable[[], None]) -> int:
        """`copy` each of `keys` under its own name, several at once; how many were there to copy.

        `check` is called before each and may raise.
        """

        def one(key: str) -> bool:
            check()
            try:
                self.copy(source, key, key)
            except FileNotFoundError:
                return False
            return True

        with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
            return sum(pool.map(one, keys))

    def _bound(self, key: str, size: int, most: int | None) -> None:
        if most is not None and size > most:
            raise RefusedInput(
                f"{self.uri}/{key}: has {size:,} bytes, at most {most:,} are read: it is damaged"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)
