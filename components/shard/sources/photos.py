"""Where the photos lie: folders, archives and S3 prefixes, one after the other; and how one of them gets in."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from components.contract.digest import fingerprint
from components.contract.store import Refusal, RefusedFile, Store, check_key, links_of, open_data_store
from components.shard.source_settings import SourceSettings
from components.shard.sources.archives import SUFFIXES, Archive
from components.shard.sources.base import RefusedSample, files_of, left_out, open_data
from components.shard.sources.record_index import File
from llava.data.images import BadImage, Size, prove, read_size, shrink
from llava.data.schema import ImageCell
from llava.errors import RefusedInput

_LARGE_PIXELS = 8_000_000
_LOOK_UPS = 8  # photos whose versions are asked for at once
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ELOOP)  # of one file; other errors are the disk's
_one_large = threading.Lock()  # large photos are decoded one at a time: 64 MP are hundreds of megabytes


class Root(Protocol):
    """A place of photos."""

    def read(self, path: str, longest: int) -> bytes | None:
        """The bytes of one photo, None if it is not there. Raises BadImage where it is not let in."""
        ...

    def version(self, path: str) -> str | None:
        """What changes when the photo does, None if it is not there."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder or an S3 prefix."""

    store: Store
    prefix: str = ""

    def read(self, path: str, longest: int) -> bytes | None:
        """The file, its size looked up first."""
        key = self.prefix + path
        try:
            found = self.store.stat(key)
            if found is None:
                return None
            if found.size > longest:
                raise BadImage("too-many-bytes", f"{key} has {found.size:,} bytes; limit {longest:,}")
            return self.store.read(key)
        except FileNotFoundError:
            return None
        except RefusedFile as error:
            raise BadImage(error.reason, str(error)) from None
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            raise BadImage("unreadable", f"{key}: {error.strerror}") from None

    def version(self, path: str) -> str | None:
        """Size and time of change, or ETag."""
        try:
            found = self.store.stat(self.prefix + path)
        except RefusedFile as error:
            return error.reason
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            return "unreadable"
        return None if found is None else f"{found.size}-{found.version}"


class Photos(NamedTuple):
    """Roots in the order in which they are looked at, each with the beginning of the paths that it serves."""

    roots: tuple[tuple[str, Root], ...]
    where: str

    def read(self, settings: SourceSettings, name: str, path: str) -> bytes:
        """The bytes of sample `name`'s photo `path`; RefusedSample."""
        if not _is_inside(path):
            text = f"image path {path!r} is not a relative path inside the data folder"
            raise RefusedSample(name, "image-path", text)
        try:
            for root, inside in self._places(path):
                data = root.read(inside, settings.max_image_bytes)
                if data is not None:
                    return data
        except BadImage as error:
            raise RefusedSample(name, error.reason, f"{path}: {error}") from None
        raise RefusedSample(name, "image-missing", f"{path} does not exist in {self.where}")

    def versions(self, paths: Sequence[str]) -> list[str]:
        """Of each photo what changes when it does; "" for one that is not there or not let in."""

        def version(path: str) -> str:
            for root, inside in self._places(path) if _is_inside(path) else ():
                if (found := root.version(inside)) is not None:
                    return found
            return ""

        wanted = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(_LOOK_UPS) as pool:
            found = dict(zip(wanted, pool.map(version, wanted), strict=True))
        return [found[path] for path in paths]

    def _places(self, path: str) -> Iterator[tuple[Root, str]]:
        """The roots that may hold the photo, with the path inside each."""
        for prefix, root in self.roots:
            if path.startswith(prefix) and len(path) > len(prefix):
                yield root, path.removeprefix(prefix)


class Photo(NamedTuple):
    """A photo that was let in; `scale`: what its sides were multiplied with (1: as it came)."""

    image: ImageCell
    size: Size
    scale: float


def external_with_roots(settings: SourceSettings) -> dict[str, str]:
    """The fingerprints of the data folder and of every further place of photos."""
    found = files_of(settings)
    for number, root in enumerate(settings.roots):
        prefix, path = _split(root)
        found[f"photos {number} {prefix}".rstrip()] = fingerprint(path, links_of(settings.follow_links))
    return found


def refused_files(settings: SourceSettings) -> list[Refusal]:
    """What lies in the data folder and in further places of photos and is neither listed nor read."""
    if settings.path is None:
        return []
    paths = [_split(root)[1] for root in settings.roots if not root.endswith(SUFFIXES)]
    stores = [open_data(settings), *(open_data_store(path, settings.follow_links) for path in paths)]
    return [one for store in stores for one in store.refused()]


def find_photos(settings: SourceSettings, *also: str) -> Photos:
    """The places of the photos: the setting, or the first that exists of images/ and `also`; then the roots.

    RefusedInput where the setting or a root names nothing.
    """
    store = open_data(settings)
    first = _inside(store, settings.images) if settings.images is not None else _usual(store, "images", *also)
    roots: list[tuple[str, Root]] = [("", first)]
    for root in settings.roots:
        prefix, path = _split(root)
        roots.append((prefix, _open(path, settings.follow_links)))
    return Photos(tuple(roots), " or ".join([store.uri, *(_split(root)[1] for root in settings.roots)]))


def admit(settings: SourceSettings, name: str, file: str, data: bytes) -> Photo:
    """Decode the photo, to prove it whole, and shrink it where the settings say so. RefusedSample."""
    try:
        size = read_size(data, settings.limits)
        large = size.width * size.height > _LARGE_PIXELS
        with _one_large if large else nullcontext():
            if settings.resize is None or min(size.width, size.height) <= settings.resize:
                prove(data, settings.limits)
                return Photo({"bytes": data, "path": PurePosixPath(file).name}, size, 1.0)
            small, shrunk = shrink(data, settings.resize, settings.limits)
    except BadImage as error:
        raise RefusedSample(name, error.reason, f"{file}: {error}") from None
    image: ImageCell = {"bytes": small, "path": f"{PurePosixPath(file).stem}.jpg"}
    return Photo(image, shrunk, shrunk.width / size.width)


def read_photo(settings: SourceSettings, photos: Photos, name: str, path: str) -> Photo:
    """The photo `path` of sample `name`. RefusedSample."""
    return admit(settings, name, path, photos.read(settings, name, path))


def resized(*photos: Photo) -> tuple[str, ...]:
    """What is to be counted about the photos of a sample."""
    return tuple("photos/resized" for photo in photos if photo.scale != 1)


def _is_inside(path: str) -> bool:
    """Whether it is a relative path of names that a file may have."""
    try:
        check_key(path)
        return len(path.encode()) <= 1024 and all(len(part.encode()) <= 255 for part in path.split("/"))
    except (RefusedInput, UnicodeEncodeError):
        return False


def _split(root: str) -> tuple[str, str]:
    prefix, equals, path = root.partition("=")
    if equals and not prefix.startswith(("/", "s3://", "~")):
        return prefix, path
    return "", root


def _usual(store: Store, *names: str) -> Root:
    for name in names:
        if _is_folder(store, name):
            return Folder(store, f"{name}/")
    for name in names:
        for suffix in SUFFIXES:
            if store.stat(name + suffix) is not None:
                return Archive(File.at(store, name + suffix))
    return Folder(store)


def _is_folder(store: Store, name: str) -> bool:
    """Whether photos are looked for there; of a link that is not followed each is refused with the reason."""
    try:
        store.stat(name)
    except RefusedFile:
        return True
    return next(store.list(f"{name}/"), None) is not None or bool(store.refused(f"{name}/"))


def _inside(store: Store, name: str) -> Root:
    if name.endswith(SUFFIXES) and store.stat(name) is not None:
        return Archive(File.at(store, name))
    return Folder(store, name.rstrip("/") + "/")


def _open(path: str, follow_links: bool | None) -> Root:
    parent, _, name = path.rstrip("/").rpartition("/")
    if name.endswith(SUFFIXES):
        # Whoever names a file means it, wherever a link of that name leads.
        store = open_data_store(parent or ("/" if path.startswith("/") else "."), True)
        if store.stat(name) is not None:
            return Archive(File.at(store, name))
    store = open_data_store(path, follow_links)
    if next(store.list(), None) is None:
        raise RefusedInput(f"shard.roots: {path}: nothing lies there{left_out(store.refused())}")
    return Folder(store)
