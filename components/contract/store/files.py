"""Regular files below a folder, whatever else somebody put there: links, pipes, devices, sockets, odd names.

| what lies there | listed and read |
|---|---|
| a regular file | yes |
| a link to a file or a folder | as `Links` says; one that leads back to a folder above it never |
| a pipe, a device, a socket | no: `not-a-file` |
| a name that is no UTF-8, or holds a backslash | no: `name` |

What is judged is what is opened: a path is first opened with O_PATH, which neither waits for a pipe nor acts on a
device; the descriptor says what it is and where it really lies, and is then opened for reading. A name that comes to
stand for something else in between changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from components.contract.store.base import SCRATCH, Refusal, check_key
from llava.errors import RefusedInput

LINKED_TIMES = 8
"""How often one folder is listed through links: folders that link to each other twice would double with each level."""
_PLACE = os.O_PATH | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_FOLLOW = "follow_links=true follows it"


class Links(StrEnum):
    """Which links are followed."""

    NONE = "none"
    INSIDE = "inside"
    """Those that lead to something inside the folder."""
    ALL = "all"


class RefusedFile(RefusedInput):
    """Something that is not read; `reason` is a short name to count by."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RefusedFile], tuple[str, str]]:
        return RefusedFile, (self.reason, str(self))


class Found(NamedTuple):
    """One listed file with its status."""

    key: str
    status: os.stat_result


class _Folder(NamedTuple):
    """A folder to list; `above`: (device, inode) of the folders that lead to it; `linked`: whether by a link."""

    key: str
    above: tuple[tuple[int, int], ...] = ()
    linked: bool = False


@dataclass(frozen=True)
class Tree:
    """Everything below the folder `root`. `top_link`: whether `root` itself may be a link."""

    root: str
    links: Links = Links.INSIDE
    top_link: bool = True

    def open(self, key: str) -> int:
        """A descriptor to read the regular file `key` from. FileNotFoundError, RefusedFile, OSError."""
        with self._at(key) as place:
            return os.open(f"/proc/self/fd/{place}", _READ)

    def stat(self, key: str) -> os.stat_result | None:
        """Of a regular file; None where nothing or a folder lies. RefusedFile, OSError."""
        try:
            with self._at(key) as place:
                return os.fstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def walk(self, start: str = "") -> Iterator[Found | Refusal]:
        """Every file and every refused entry below the folder `start`, in no particular order."""
        waiting, linked = [_Folder(check_key(start) if start else "")], Counter[tuple[int, int]]()
        while waiting:
            folder = waiting.pop()
            try:
                yield from self._listed(folder, waiting, linked)
            except RefusedFile as error:
                yield _refused(folder.key, error)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                yield _refused(folder.key, RefusedFile("unreadable", f"{folder.key}: {error.strerror}"))

    def _listed(
        self, folder: _Folder, waiting: list[_Folder], linked: Counter[tuple[int, int]]
    ) -> Iterator[Found | Refusal]:
        descriptor = os.open(f"{self.root}/{folder.key}", _FOLDER)
        try:
            self._check_place(folder.key, descriptor)
            status = os.fstat(descriptor)
            own = (status.st_dev, status.st_ino)
            if own in folder.above:
                raise RefusedFile("link-loop", f"{folder.key}: a link to a folder above it")
            linked[own] += folder.linked
            if linked[own] > LINKED_TIMES:
                raise RefusedFile("link-again", f"{folder.key}: links lead to this folder too often")
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    if not entry.name.startswith(SCRATCH):
                        yield from self._entry(folder, entry, (*folder.above, own), descriptor, waiting)
        finally:
            os.close(descriptor)

    def _entry(
        self,
        folder: _Folder,
        entry: os.DirEntry[str],
        above: tuple[tuple[int, int], ...],
        descriptor: int,
        waiting: list[_Folder],
    ) -> Iterator[Found | Refusal]:
        key = f"{folder.key}/{entry.name}" if folder.key else entry.name
        try:
            _check_name(key)
            status, is_link = entry.stat(follow_symlinks=False), entry.is_symlink()
            if is_link:
                with _opened(entry.name, descriptor) as place:
                    status = os.fstat(place)
                    self._check_place(key, place)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(_Folder(key, above, is_link or folder.linked))
                return
            _check_kind(key, status)
            yield Found(key, status)
        except RefusedFile as error:
            yield _refused(key, error)
        except FileNotFoundError:
            if entry.is_symlink():
                yield _refused(key, RefusedFile("link-to-nothing", f"{shown(key)}: a link to nothing"))
        except OSError as error:
            yield _refused(key, RefusedFile("unreadable", f"{shown(key)}: {error.strerror}"))

    @contextmanager
    def _at(self, key: str) -> Iterator[int]:
        """A descriptor that only names the regular file `key`."""
        with _opened(f"{self.root}/{check_key(key)}") as place:
            try:
                self._check_place(key, place)
                status = os.fstat(place)
                if stat.S_ISDIR(status.st_mode):
                    raise FileNotFoundError(f"{self.root}/{key} is a folder")
                _check_kind(key, status)
            except RefusedFile as error:
                raise RefusedFile(error.reason, f"{self.root}: {error}") from None
            yield place

    def _check_place(self, key: str, descriptor: int) -> None:
        """Raise RefusedFile where the links that led here are not followed."""
        if self.links is Links.ALL:
            return
        if not os.fstat(descriptor).st_nlink:
            raise FileNotFoundError(f"{self.root}/{key} was deleted")
        real, top = _real(descriptor), self._top()
        if self.links is Links.NONE and real != os.path.normpath(f"{top}/{key}"):
            raise RefusedFile("link", f"{key}: a link, or in a linked folder; no link is followed here")
        if real != top and not real.startswith(f"{top.rstrip('/')}/"):
            raise RefusedFile("link-outside", f"{key}: a link that leaves {self.root}; {_FOLLOW}")

    def _top(self) -> str:
        """Where the folder really lies."""
        with _opened(self.root, flags=_PLACE if self.top_link else _PLACE | os.O_NOFOLLOW) as place:
            if stat.S_ISLNK(os.fstat(place).st_mode):
                raise RefusedFile("link", "the folder itself is a link; no link is followed here")
            return _real(place)


def _real(descriptor: int) -> str:
    """The path of what is open, without links."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def shown(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _refused(key: str, error: RefusedFile) -> Refusal:
    return Refusal(shown(key) or ".", error.reason, str(error))


def _check_name(key: str) -> None:
    try:
        check_key(key)
    except RefusedInput:
        raise RefusedFile(
            "name", f"{shown(key)}: the name is no UTF-8 or holds a backslash; rename it"
        ) from None


def _check_kind(key: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise RefusedFile("not-a-file", f"{key}: {kind}; only regular files are read")


@contextmanager
def _opened(path: str, folder: int | None = None, flags: int = _PLACE) -> Iterator[int]:
    descriptor = os.open(path, flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
