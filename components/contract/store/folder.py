"""A folder as a store: temporary files put in place by rename or link, compare and swap under a file lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from components.contract.store.base import SCRATCH, Entry, Stat, Store, check_key, is_text
from components.contract.store.files import Links, Tree
from llava.errors import RefusedInput

_COPIED_AT_ONCE = 8 << 20


class FolderStore(Store):
    """Files under one folder. Also right on a network file system that keeps flock and link (NFSv4)."""

    def __init__(self, path: Path | str) -> None:
        self._root = Path(path).expanduser().absolute()
        self.uri = str(self._root)

    @property
    def local_path(self) -> Path:
        """The folder."""
        return self._root

    def fetch(self, key: str, most: int | None = None) -> tuple[bytes, str] | None:
        """Bytes and version from one open file, so that they belong together."""
        try:
            with os.fdopen(self._open(key), "rb") as file:
                found = os.fstat(file.fileno())
                self._bound(key, found.st_size, most)
                return file.read(), version_of(found)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        """Temporary file, then rename."""
        with self._temporary(key, data) as temporary:
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> bool:
        """Temporary file, then a hard link, which fails where the name is taken."""
        with self._temporary(key, data) as temporary:
            try:
                os.link(temporary, self._path(key))
            except FileExistsError:
                return False
            return True

    def swap(self, key: str, data: bytes, version: str) -> bool:
        """Read, compare and rename while holding the lock that belongs to `key`."""
        with self._locked(key):
            current = self._file_stat(key)
            if current is None or version_of(current) != version:
                return False
            with self._temporary(key, data) as temporary:
                # Clocks of file systems tick in milliseconds: an increasing time keeps two quick swaps apart.
                modified = max(temporary.stat().st_mtime_ns, current.st_mtime_ns + 1)
                os.utime(temporary, ns=(modified, modified))
                temporary.replace(self._path(key))
        return True

    def stat(self, key: str) -> Stat | None:
        """Size and version, or None."""
        found = self._file_stat(key)
        return None if found is None else Stat(found.st_size, version_of(found))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Files in the order of their keys; a store's own scratch files are left out."""
        yield from sorted(self._walk(prefix), key=lambda entry: entry.key.encode())

    def folders(self) -> Sequence[str]:
        """Folders and links to folders."""
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if path.is_dir())

    def delete(self, key: str) -> None:
        """Remove the file and the lock file that `swap` made for it."""
        with self._locked(key) as lock:
            self._path(key).unlink(missing_ok=True)
            if lock is not None:
                lock.unlink(missing_ok=True)

    def delete_all(self, prefix: str = "") -> None:
        """Remove the folder `prefix` with everything in it."""
        folder = self._path(prefix.rstrip("/")) if prefix.rstrip("/") else self._root
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)

    def upload(self, path: Path | str, key: str) -> None:
        """Copy beside the goal, then rename."""
        with self._temporary(key, None) as temporary:
            shutil.copyfile(path, temporary)
            _flush(temporary)
            temporary.replace(self._path(key))

    def download(self, key: str, path: Path | str) -> None:
        """Copy beside `path`, then rename."""
        goal = Path(path)
        goal.parent.mkdir(parents=True, exist_ok=True)
        temporary = goal.parent / f"{SCRATCH}{uuid4().hex}"
        try:
            with os.fdopen(self._open(key), "rb") as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, _COPIED_AT_ONCE)
            temporary.replace(goal)
        finally:
            temporary.unlink(missing_ok=True)

    def copy(self, source: Store, key: str, to: str) -> None:
        """A hard link, put in place by rename: files of a store are replaced, never written into."""
        origin = source.local_path
        assert origin is not None
        if source.stat(key) is None:
            raise FileNotFoundError(f"{source.uri}/{key} does not exist")
        with self._temporary(to, None) as temporary:
            try:
                os.link(origin / check_key(key), temporary)
            except OSError:  # another file system, or one without links
                source.download(key, temporary)
                _flush(temporary)
            temporary.replace(self._path(to))

    def chunks(self, key: str, size: int = 8 << 20) -> Iterator[bytes]:
        """The file's bytes, `size` at a time."""
        with os.fdopen(self._open(key), "rb") as file:
            while chunk := file.read(size):
                yield chunk

    def sub(self, prefix: str) -> FolderStore:
        """The folder `prefix` inside this one."""
        return FolderStore(self._path(prefix.strip("/")))

    def arrow(self) -> tuple[Any, str]:
        """pyarrow's local file system and the folder; the folder is made, since pyarrow does not."""
        from pyarrow.fs import LocalFileSystem

        self._root.mkdir(parents=True, exist_ok=True)
        return LocalFileSystem(), self.uri

    def open(self, key: str) -> Any:
        """pyarrow's file; nothing but a regular file is opened."""
        from pyarrow.fs import LocalFileSystem

        descriptor = self._open(key)
        try:
            return LocalFileSystem().open_input_file(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def probe(self) -> None:
        """Write into the folder, and leave none that was not there; RefusedInput where that is not possible."""
        try:
            new = [path for path in (self._root, *self._root.parents) if not path.exists()]
            super().probe()
            for path in new:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    path.rmdir()
        except OSError as error:
            reason = error.strerror or str(error)
            raise RefusedInput(
                f"root {self.uri}: cannot write there ({reason}): make room or give a folder you may write to"
            ) from None

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _open(self, key: str) -> int:
        """A descriptor to read `key` from; FileNotFoundError, or RefusedFile for what is no regular file."""
        return Tree(self.uri, Links.ALL).open(key)

    def _file_stat(self, key: str) -> os.stat_result | None:
        try:
            found = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def _walk(self, prefix: str) -> Iterator[Entry]:
        start = self._root / prefix.rpartition("/")[0]
        if ".." in prefix.split("/"):
            raise RefusedInput(f"prefix {prefix!r}: must stay inside {self.uri}")
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._root).as_posix()
                if name.startswith(SCRATCH) or not key.startswith(prefix):
                    continue
                try:
                    found = path.stat()
                except OSError as error:
                    # Deleted by another process meanwhile, or a link that leads to itself.
                    if error.errno in (errno.ENOENT, errno.ELOOP):
                        continue
                    raise
                if stat.S_ISREG(found.st_mode) and is_text(key):
                    yield Entry(key, found.st_size, version_of(found))

    @contextlib.contextmanager
    def _temporary(self, key: str, data: bytes | None) -> Iterator[Path]:
        """A scratch file beside `key`, holding `data`, on disk; gone at the end if it was not renamed."""
        goal = self._path(key)
        temporary = goal.parent / f"{SCRATCH}{uuid4().hex}"
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                temporary.unlink()

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[Path | None]:
        """Hold the lock of `key`; None where its folder does not exist, so that there is nothing to guard."""
        path = _lock_path(self._path(key))
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except (FileNotFoundError, NotADirectoryError):
                yield None
                return
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Whoever deleted the key also removed this file: a lock on a removed file guards nothing.
                if os.fstat(descriptor).st_nlink:
                    yield path
                    return
            finally:
                os.close(descriptor)


def _lock_path(path: Path) -> Path:
    return path.parent / f"{SCRATCH}lock-{path.name}"


def version_of(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
