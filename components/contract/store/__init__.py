"""Where artifacts live: a folder or an S3 prefix behind one small interface."""

from __future__ import annotations

from pathlib import Path

from components.contract.secrets import refuse_secrets
from components.contract.store.base import Entry, Refusal, Stat, Store, StoreError, check_key
from components.contract.store.data import DataFolder, links_of
from components.contract.store.files import Links, RefusedFile
from components.contract.store.folder import FolderStore
from components.contract.store.s3 import S3Store
from llava.errors import RefusedInput

Folder = Store  # a folder of an artifact is simply a store for a prefix


def open_store(uri: str | Path) -> Store:
    """The store at `uri`: a folder's path or `s3://bucket/prefix`.

    Nothing is contacted or made here; `Store.probe` does that. Raises RefusedInput for any other scheme and
    for credentials inside the URI.
    """
    text = refuse_secrets(str(uri), "the root's URI").strip()
    if text.startswith("s3://"):
        return S3Store.from_uri(text)
    if not text or "://" in text or "\0" in text:
        raise RefusedInput(f"root {text!r}: give a folder's path or s3://bucket/prefix")
    return FolderStore(Path(text))


def open_data_store(uri: str | Path, follow_links: bool | None = None) -> Store:
    """The store of outside data at `uri`, a folder's path or `s3://bucket/prefix`.

    `follow_links`: None: links that stay inside the folder; True: all; False: none, and the folder itself is none.
    """
    store = open_store(uri)
    if store.local_path is None:
        return store
    links = links_of(follow_links)
    return DataFolder(store.local_path, links, top_link=links is not Links.NONE)


__all__ = [
    "DataFolder",
    "Entry",
    "Folder",
    "FolderStore",
    "Links",
    "Refusal",
    "RefusedFile",
    "S3Store",
    "Stat",
    "Store",
    "StoreError",
    "check_key",
    "links_of",
    "open_data_store",
    "open_store",
]
