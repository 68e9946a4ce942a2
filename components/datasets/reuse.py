"""Shards of earlier artifacts of the same root, found again by what they were made of.

`shards.jsonl` in a finished artifact holds one line a shard: its files with rows, bytes and sha256, what was refused
and counted, and `made_of`, a digest of everything that its bytes come from. A line that a new shard would write again
is copied with its files. What a data set holds never depends on this: a shard that was copied is the one that would
have been made.

An artifact that is not finished, stopped or still in the making, has a record of the same content for each finished
shard, written after the shard's files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from components.contract.component import Job
from components.contract.manifest import ATTEMPTS, MANIFEST
from components.contract.store import Folder, open_store
from components.datasets.results import ShardResult
from llava.data.jsonl import from_json

SHARDS_FILE = "shards.jsonl"
RECORDS = "checkpoints/shards"
_PATH = re.compile(rf"(?P<folder>(?P<address>[^/]+)(?:/{ATTEMPTS}/[^/]+)?)/(?P<name>.+)")
_READS = 16  # records that are read at once: an unfinished artifact has one for each shard


class _Line(NamedTuple):
    """Where a shard's line stands: the artifact, the file in it, the first byte and the number of bytes."""

    artifact: str
    key: str
    start: int
    size: int


@dataclass(frozen=True)
class EarlierShards:
    """Lines by `made_of`: a few dozen bytes a shard, since every task takes this along."""

    lines: dict[str, _Line]

    @classmethod
    def of(cls, job: Job[Any]) -> EarlierShards | None:
        """Those of all other artifacts that the job's component has in its root; None where there are none."""
        store = job.workspace.store.sub(job.component)
        keys = {entry.key for entry in store.list()}
        wanted: list[tuple[bool, str, str]] = []
        for key in keys:
            # The folder of an attempt stands for the artifact: what is copied from it is looked at again.
            if matched := _PATH.fullmatch(key):
                finished = f"{matched['address']}/{MANIFEST}" in keys
                name = matched["name"]
                if name == SHARDS_FILE if finished else name.startswith(f"{RECORDS}/"):
                    wanted.append((finished, matched["folder"], name))
        folders = {folder: store.sub(folder) for _, folder, _ in wanted}
        # The finished ones last: they win.
        others = [
            (folders[one], name) for _, one, name in sorted(wanted) if folders[one].uri != job.folder.uri
        ]
        lines: dict[str, _Line] = {}
        with ThreadPoolExecutor(_READS) as pool:
            for found in pool.map(lambda index: _lines(*index), others):
                lines |= found
        return cls(lines) if lines else None

    def copied(self, made_of: str, folder: Folder, name: Callable[[str], str]) -> ShardResult | None:
        """The shard that was made of the same, with its files under `name(split)` in `folder`; None: make it.

        In a local folder the copies are hashed; on S3 whoever fetches them does that.
        """
        found = self.lines.get(made_of)
        if found is None:
            return None
        origin = open_store(found.artifact)
        try:
            system, base = origin.arrow()
            with system.open_input_file(f"{base}/{found.key}") as lines:
                result = ShardResult.from_json(lines.read_at(found.size, found.start))
            for file in result.files:
                source, file["path"] = file["path"], name(file["split"])
                folder.copy(origin, source, file["path"])
                stat = folder.stat(file["path"])
                if stat is None or stat.size != file["size"]:
                    return None
                if folder.local_path is not None and folder.sha256(file["path"]) != file["sha256"]:
                    return None
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return replace(result, reused=1)


def _lines(folder: Folder, key: str) -> dict[str, _Line]:
    """The lines of a file, by `made_of`."""
    lines: dict[str, _Line] = {}
    start = 0
    with suppress(
        FileNotFoundError, ValueError, LookupError, TypeError
    ):  # pruned meanwhile, or damaged: made anew
        for line in folder.read(key).splitlines(keepends=True):
            if made_of := from_json(line)["made_of"]:
                lines[made_of] = _Line(folder.uri, key, start, len(line))
            start += len(line)
    return lines


def write_shards_file(folder: Folder, results: Sequence[ShardResult]) -> None:
    """One line a shard, in their order; the same whether a shard was made or copied."""
    folder.write(SHARDS_FILE, b"".join(replace(one, reused=0).to_json() + b"\n" for one in results))
