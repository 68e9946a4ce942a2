"""Data from outside the root: the folder or S3 prefix that a user names, where anybody may have put anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from components.contract.store.base import Entry, Refusal, Stat
from components.contract.store.files import Found, Links, Tree
from components.contract.store.folder import FolderStore, version_of


class DataFolder(FolderStore):
    """A folder of which only regular files are listed and read, links as `links` says; see `files.py`."""

    def __init__(self, path: Path | str, links: Links = Links.INSIDE, *, top_link: bool = True) -> None:
        super().__init__(path)
        self.tree = Tree(self.uri, links, top_link)

    def stat(self, key: str) -> Stat | None:
        """Size and version, or None; RefusedFile for what would not be read."""
        found = self.tree.stat(key)
        return None if found is None else Stat(found.st_size, version_of(found))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Files in the order of their keys, also those below linked folders."""
        found = [
            Entry(one.key, one.status.st_size, version_of(one.status))
            for one in self.tree.walk(prefix.rpartition("/")[0])
            if isinstance(one, Found) and one.key.startswith(prefix)
        ]
        yield from sorted(found, key=lambda entry: entry.key.encode())

    def refused(self, prefix: str = "") -> Sequence[Refusal]:
        """What `list` leaves out and why, in the order of the names."""
        walked = self.tree.walk(prefix.rpartition("/")[0])
        found = [
            one
            for one in walked
            if isinstance(one, Refusal) and (one.key.startswith(prefix) or prefix.startswith(f"{one.key}/"))
        ]
        return sorted(found)

    def sub(self, prefix: str) -> DataFolder:
        """The folder `prefix`, which may itself be a link where links are followed."""
        links = self.tree.links
        return DataFolder(self._path(prefix.strip("/")), links, top_link=links is not Links.NONE)

    def _open(self, key: str) -> int:
        return self.tree.open(key)


def links_of(follow_links: bool | None) -> Links:
    """Which links such a setting means."""
    return {None: Links.INSIDE, True: Links.ALL, False: Links.NONE}[follow_links]
