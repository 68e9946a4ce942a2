"""A further dataset that a training stage is given by its URI: an artifact, or a folder of Parquet files."""

from __future__ import annotations

from typing import NamedTuple

from components.contract.manifest import Artifact, parquet_in, read_artifact
from components.contract.printable import printable
from components.contract.store import Folder, Refusal, open_data_store, open_store

TRAIN = "train"


class Extra(NamedTuple):
    """Where its training files lie. `refused`: what lies beside them and is not read."""

    folder: Folder
    keys: tuple[str, ...]
    artifact: Artifact | None = None
    refused: tuple[Refusal, ...] = ()

    @property
    def unread(self) -> str:
        """What is not read, for a message: "" for nothing."""
        if not self.refused:
            return ""
        return (
            f" ({len(self.refused):,} entries are not read, such as {printable(self.refused[0].text)[:300]})"
        )


def look(uri: str, follow_links: bool | None) -> Extra:
    """The files in `train/`, else those at its top; of a folder by the rule for data from outside the root."""
    if artifact := read_artifact(open_store(uri)):
        return Extra(artifact.folder, artifact.parquet(TRAIN), artifact)
    folder = open_data_store(uri, follow_links)
    keys = [entry.key for entry in folder.list()]
    return Extra(folder, parquet_in(keys, TRAIN) or parquet_in(keys), None, tuple(folder.refused()))
