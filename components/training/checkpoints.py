"""Training checkpoints in an artifact's folder: each rank's files, then the commit marker; the newest few are kept.

A checkpoint lies in `checkpoints/{step}-{token}-{start}/`, in the folder of the try that made it. `token` is the
lease's fencing token: a worker of a lost run can never write into the checkpoint of the run that took over. `start`
names one start of the worker group: what a killed group left unfinished never mixes with what the next one writes. A
later try reads the checkpoints of the earlier ones where they are, since they are large.

Each rank writes its share and then, as `share-RANK.json`, what it wrote. Rank 0 waits for all of these, in its thread,
and commits: `COMMITTED` holds size and sha256 of every file and says where each piece of the state lies.
"""

import contextlib
import errno
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contract import Folder, Guard, StoreError
from components.contract.store import check_key
from components.training.record import CHECKPOINTS
from llava.data.jsonl import from_json
from llava.errors import LlavaError, RefusedInput
from llava.training import checkpoint as files
from llava.training.checkpoint import PARTS, Fragment, SavedState, Share, Written
from llava.training.engine import Engine
from llava.training.loop import any_of, gathered, told

COMMITTED = "COMMITTED"
_EVERY = 0.1
"""Seconds between two looks for the shares of the other ranks; grows to a second."""
ARRIVE = 30.0
"""Seconds that rank 0 waits for the others' shares when the run ends with a failure: they end, too, and may be near."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Damaged(LlavaError):
    """A checkpoint is not what was committed; the message says what is wrong with it.

    A group that starts again goes on from the one before.
    """


@dataclass(frozen=True)
class CheckpointFolders:
    """Where a run keeps its checkpoints."""

    folder: Folder
    guard: Guard
    keep: int
    earlier: tuple[Folder, ...] = ()
    """The folders of earlier tries, whose checkpoints count for `keep` too."""

    def newest_first(self) -> list[Folder]:
        """The committed checkpoints of all tries."""
        return list(reversed(self._found()[0]))

    def checkpoint(self, step: int, start: str) -> Folder:
        """The folder of the checkpoint of `step` that the group `start` makes."""
        return self.folder.sub(f"{CHECKPOINTS}/{step:09d}-{self.guard.token:06d}-{start}")

    def clean(self) -> None:
        """Delete what was never committed: a full disk or a kill came between. Nobody else writes here now."""
        self.guard.check()
        for folder in self._found()[1]:
            folder.delete_all()

    def prune(self) -> None:
        """Delete the oldest checkpoints over `keep`."""
        for old in self._found()[0][: -self.keep]:
            remove(old)

    def _found(self) -> tuple[list[Folder], list[Folder]]:
        """Committed checkpoints by step, token and start, and the others."""
        named: dict[str, tuple[Folder, bool]] = {}
        for folder in (self.folder, *self.earlier):
            for entry in folder.list(f"{CHECKPOINTS}/"):
                name, _, file = entry.key.removeprefix(f"{CHECKPOINTS}/").partition("/")
                # Ray keeps a folder of its own beside them.
                if name[:9].isdigit() and file:
                    done = named.get(name, (folder, False))[1] or file == COMMITTED
                    named[name] = (folder, done)
        found = [
            (folder.sub(f"{CHECKPOINTS}/{name}"), done) for name, (folder, done) in sorted(named.items())
        ]
        return [each for each, done in found if done], [each for each, done in found if not done]


def remove(checkpoint: Folder) -> None:
    """Delete a checkpoint, its marker first."""
    checkpoint.delete(COMMITTED)
    checkpoint.delete_all()


class Saver:
    """Stores one rank's shares in a thread of its own while training goes on; one at a time, in order."""

    def __init__(self, folders: CheckpointFolders, rank: int, world: int, start: str, scratch: Path) -> None:
        """`start`: the same on all ranks of the group, and of no other group."""
        self.folders, self.rank, self.world, self.start = folders, rank, world, start
        self._scratch = scratch
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._until = math.inf
        """When to stop waiting for the shares of the other ranks."""

    def wait(self) -> None:
        """Until this rank's share of the checkpoint before is stored, on rank 0 until all are and it is committed;
        raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def check(self) -> None:
        """Raise what went wrong with the share that is under way, as soon as that is known."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def save(self, step: int, fragments: Sequence[Fragment], more: Mapping[str, bytes]) -> Folder:
        """Store this rank's share of the checkpoint of `step`, after the one before, and its files `more`.

        All ranks call it, each with its own fragments; rank 0 commits when all are there. Returns the checkpoint.
        """
        self.wait()
        there = self.folders.checkpoint(step, self.start)
        self._pending = self._pool.submit(self._store, there, fragments, more)
        return there

    def close(self) -> None:
        """Let a share that is under way arrive; its failure no longer matters to whoever fails himself."""
        self._until = time.monotonic() + ARRIVE
        self._pool.shutdown(wait=True)

    def _store(self, there: Folder, fragments: Sequence[Fragment], more: Mapping[str, bytes]) -> None:
        self.folders.guard.check()
        try:
            share = self._written(there, fragments, more)
            there.write(files.share_file(self.rank), json.dumps(share.as_json()).encode())
            if self.rank == 0:
                self._commit(there)
        except BaseException as error:
            self._take_away(there, more)
            if isinstance(error, OSError) and error.errno in _FULL:
                full, way_out = there.uri, "make room, or keep fewer with keep_checkpoints"
                if there.local_path is None:
                    full, way_out = f"{self._scratch}, on its way to {there.uri}", "make room, or set TMPDIR"
                raise LlavaError(
                    f"checkpoint {full}: {error.strerror}: {way_out}; the same command goes on from the checkpoint "
                    "before"
                ) from error
            raise

    def _take_away(self, there: Folder, more: Iterable[str]) -> None:
        """What this rank wrote of a checkpoint that will never be whole. That of others is theirs: they may be at it.

        The reason of the failure counts, not how this goes: the next start deletes what is left.
        """
        with contextlib.suppress(Exception):
            if there.stat(COMMITTED) is None:
                tensors = (files.file_of(part, self.rank, self.world) for part in PARTS)
                for name in (*tensors, *more, files.share_file(self.rank)):
                    there.delete(name)
                if (path := there.local_path) is not None:
                    path.rmdir()

    def _written(self, there: Folder, fragments: Sequence[Fragment], more: Mapping[str, bytes]) -> Share:
        if (path := there.local_path) is not None:
            return self._files(path, fragments, more)
        with tempfile.TemporaryDirectory(dir=self._scratch) as local:
            share = self._files(Path(local), fragments, more)
            for name in share.files:
                there.upload(Path(local) / name, name)
            return share

    def _files(self, folder: Path, fragments: Sequence[Fragment], more: Mapping[str, bytes]) -> Share:
        share = files.write_share(folder, self.rank, self.world, fragments)
        for name, data in more.items():
            (folder / name).write_bytes(data)
            share.files[name] = files.written(folder / name)
        return share

    def _commit(self, there: Folder) -> None:
        shares = self._arrived(there)
        # Waiting may take longer than a lost lease takes to be taken over.
        self.folders.guard.check()
        there.write(COMMITTED, json.dumps([share.as_json() for share in shares]).encode())
        # It stands. What cannot be deleted now is deleted the next time.
        with contextlib.suppress(StoreError, OSError):
            self.folders.prune()

    def _arrived(self, there: Folder) -> list[Share]:
        """What all ranks wrote, by rank, when they have. Each is read as it comes: after the last one little is left
        to do, however many there are."""
        missing, found = {files.share_file(rank): rank for rank in range(self.world)}, dict[int, Share]()
        pause = _EVERY
        while True:
            for entry in there.list("share-"):
                if (rank := missing.pop(entry.key, None)) is not None:
                    found[rank] = self._share(there, rank)
            if not missing:
                return [found[rank] for rank in range(self.world)]
            if time.monotonic() > self._until:
                raise LlavaError(
                    f"checkpoint {there.uri}: the run ended before all ranks had stored their shares"
                )
            time.sleep(pause)
            self.folders.guard.check()
            pause = min(1.0, pause * 1.5)

    def _share(self, there: Folder, rank: int) -> Share:
        return Share.from_json(from_json(there.read(files.share_file(rank))))


class Checkpoint:
    """A committed checkpoint."""

    def __init__(self, folder: Folder) -> None:
        """Raises `Damaged` where the marker is none; a store that does not answer is another matter."""
        self.folder = folder
        marker = folder.read(COMMITTED)
        try:
            self.shares = [Share.from_json(one) for one in from_json(marker)]
            self.files: dict[str, Written] = {}
            for share in self.shares:
                self.files |= {check_key(name): file for name, file in share.files.items()}
                if share.pieces and not all(
                    any(name.startswith(f"{part}-") for name in share.files) for part in PARTS
                ):
                    raise ValueError("a share without its tensors")
            if files.STATE not in self.files:
                raise ValueError(f"no {files.STATE} is in it")
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RefusedInput) as error:
            raise Damaged(f"{COMMITTED} cannot be read ({type(error).__name__}: {error})") from None

    def check(self, rank: int, world: int) -> None:
        """Compare this rank's part of the files with what was committed; all ranks together look at all of them.

        Raises `Damaged`.
        """
        for name in sorted(self.files)[rank::world]:
            committed, found = self.files[name], self.folder.stat(name)
            if found is None or found.size != committed.size:
                size = "is gone" if found is None else f"has {found.size} bytes"
                raise Damaged(f"{name} {size}, {committed.size} were committed")
            if self.folder.sha256(name) != committed.sha256:
                raise Damaged(f"{name} has other contents than were committed")

    def position(self, plan: dict[str, Any]) -> files.Position:
        """Where it stands. Refuses a checkpoint of another plan."""
        try:
            return files.position_of(self.folder.read(files.STATE), plan, self.folder.uri)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LlavaError(
                f"checkpoint {self.folder.uri}: {files.STATE} cannot be read ({type(error).__name__}: {error}): delete "
                "the checkpoint to resume from the one before"
            ) from None

    def state(self, position: files.Position) -> SavedState:
        """What lies in it; close it."""
        return SavedState(self.folder.uri, position.update, self.shares, self.folder.open)

    def lines(self, prefix: str) -> list[bytes]:
        """The contents of all files whose names begin with `prefix`, by name."""
        return [self.folder.read(name) for name in sorted(self.files) if name.startswith(prefix)]


def newest_whole(
    folders: CheckpointFolders, engine: Engine, tell: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint that is what was committed, or None. All ranks call it.

    A damaged one is told of, deleted and passed over.
    """
    chief = engine.rank == 0
    candidates: list[Folder] = told(engine, folders.newest_first() if chief else None)
    for number, folder in enumerate(candidates):
        found, problem = looked_at(folder, engine)
        if not any_of(engine, problem is not None):
            return found
        problems = [each for each in gathered(engine, problem) if each is not None]
        if chief:
            then = (
                "going on from the one before" if candidates[number + 1 :] else "starting from the beginning"
            )
            tell(f"checkpoint {folder.uri} is damaged ({problems[0]}) and is deleted: {then}")
            folders.guard.check()
            remove(folder)
    return None


def looked_at(folder: Folder, engine: Engine) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint, or what this rank finds wrong with its part of it."""
    try:
        found = Checkpoint(folder)
        found.check(engine.rank, engine.world)
    except Damaged as damaged:
        return None, str(damaged)
    except FileNotFoundError as gone:
        return None, str(gone)
    return found, None
