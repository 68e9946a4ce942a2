"""What a root holds that nothing refers to, and its removal, by way of `trash/`.

Referred to is everything from which a registered version was made, the shards of the drops that were taken, what the
plan of a retraining and the versions of the dataset name, and whatever those were made from (see
`workflows.references`). Whatever somebody is making right now stays, and so does what was finished or left a moment
ago, with its inputs: a run may be between two stages.

What goes lies in `trash/TIME/` first. Nothing is deleted there before its days are over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from components.contract import (
    MANIFEST,
    Artifact,
    Folder,
    Store,
    acquire,
    artifact_folders,
    open_store,
    read_artifact,
    say,
)
from components.contract.lease import LEASE, LeaseRecord, read_lease
from components.registry import existing_registry
from llava.errors import AlreadyRunning, RefusedInput
from workflows.references import references, unfinished_inputs, with_inputs
from workflows.retraining.records import PLACE
from workflows.stages import STAGES

TRASH = "trash"
KEEP_DAYS = 7.0
_TIME = "%Y%m%dT%H%M%SZ"
_ADDRESS = re.compile(r"[a-z_]+/[0-9a-f]{16}")


@dataclass(frozen=True)
class Found:
    """One artifact folder of a root."""

    address: str
    folder: Folder
    artifact: Artifact | None
    """None where it is not finished."""
    size: int
    """Bytes."""
    lease: LeaseRecord | None

    def recent(self, fresh: timedelta) -> bool:
        """Whether it was finished, or its maker gave a sign of life, in the time `fresh`."""
        since = datetime.now(UTC) - fresh
        if self.artifact is not None:
            return self.artifact.manifest.created > since
        return self.lease is not None and self.lease.expires > since.timestamp()


def prune(
    root: str, yes: bool, fresh: timedelta, keep_days: float = KEEP_DAYS, gone: Sequence[str] = ()
) -> None:
    """List the artifacts that nothing refers to; `yes` moves them to `trash/`, and empties it of what is older.

    `fresh`: what was finished in that time stays, with its inputs. `keep_days`: how long a thing lies in `trash/`; 0
    deletes at once. `gone`: versions (`NAME/VERSION`) that were deleted from the registry on purpose. Raises
    RefusedInput, before anything is moved, where the registry is not the one that the root's artifacts name.
    """
    store = open_store(root)
    found = _artifacts(store)
    artifacts = {each.artifact.digest: each.artifact for each in found if each.artifact is not None}
    kept = references(store, artifacts, existing_registry(root), gone)
    recent = [each for each in found if each.recent(fresh)]
    kept += [each.artifact.digest for each in recent if each.artifact is not None]
    kept += [digest for each in recent if each.artifact is None for digest in unfinished_inputs(each.folder)]
    stays = with_inputs(kept, artifacts)
    _refuse_while_something_runs(store, found, yes)
    out = store.sub(f"{TRASH}/{datetime.now(UTC):{_TIME}}")
    size = 0
    for each in found:
        if each.artifact.digest in stays if each.artifact is not None else each in recent:
            continue
        state = "unfinished" if each.artifact is None else "unreferred"
        say(f"{state} {each.size / 2**20:10.1f} MiB  {each.folder.uri}")
        size += each.size
        if yes:
            _remove(each, out.sub(each.address) if keep_days else None)
    _tell(size, yes, out.uri, keep_days)
    _empty_trash(store, yes, timedelta(days=keep_days))


def restore(root: str, address: str) -> None:
    """Bring the artifact `COMPONENT/DIGEST` back from `trash/`; RefusedInput where it is not there, or made again."""
    store = open_store(root)
    if not _ADDRESS.fullmatch(address):
        raise RefusedInput(f"--restore {address}: give COMPONENT/DIGEST, 16 hex digits, as prune lists it")
    trashed = [
        time for time in _times(store) if store.stat(f"{TRASH}/{time}/{address}/{_COMPLETE}") is not None
    ]
    if not trashed:
        raise RefusedInput(f"{store.uri}/{TRASH}: no {address} lies there")
    goal, origin = store.sub(address), store.sub(f"{TRASH}/{trashed[-1]}/{address}")
    if next(iter(goal.list()), None) is not None:
        raise RefusedInput(f"{goal.uri}: something lies there again; nothing is restored over it")
    with acquire(goal, wait=False) as lease:
        _copy(origin, goal, lease.check_if_lost)
    goal.delete(LEASE)
    origin.delete(_COMPLETE)
    origin.delete_all()
    if next(iter((time := store.sub(f"{TRASH}/{trashed[-1]}")).list()), None) is None:
        time.delete_all()
    say(f"restored {goal.uri}")


_COMPLETE = "complete"
"""In a folder of the trash: everything was copied into it."""


def _artifacts(store: Store) -> list[Found]:
    """Every artifact folder of the root, finished or not, whatever stage it is of."""
    known = {stage.component.name for stage in STAGES}
    return [
        Found(address, folder := store.sub(address), read_artifact(folder), size, read_lease(folder))
        for address, size in artifact_folders(store, known).items()
    ]


def _refuse_while_something_runs(store: Store, found: Sequence[Found], yes: bool) -> None:
    leases = [(each.folder.uri, each.lease) for each in found]
    leases.append((store.sub(PLACE).uri, read_lease(store.sub(PLACE))))
    for uri, lease in leases:
        if lease is not None and not lease.free:
            if yes:
                raise AlreadyRunning(f"{uri}: {lease.who} is making something here; prune when nothing runs")
            say(f"in use     {uri}: {lease.who}")


def _remove(each: Found, goal: Folder | None) -> None:
    """Move the artifact to `goal`, or delete it; while that goes on nobody else makes it."""
    with acquire(each.folder, wait=False) as lease:
        if goal is not None:
            _copy(each.folder, goal, lease.check_if_lost)
            goal.write(_COMPLETE, b"")
        # First: cut short after it, the artifact is unfinished and not broken.
        each.folder.delete(MANIFEST)
    each.folder.delete_all()


def _copy(origin: Folder, goal: Folder, check: Callable[[], None]) -> None:
    """All files but the lease, the manifest last."""
    keys = [entry.key for entry in origin.list() if entry.key not in (LEASE, MANIFEST, _COMPLETE)]
    goal.copy_all(origin, keys, check)
    goal.copy_all(origin, [MANIFEST], check)


def _times(store: Store) -> list[str]:
    """The folders of the trash, the oldest first; what prune did not make is left alone."""
    return [name for name in store.sub(TRASH).folders() if _time(name) is not None]


def _time(name: str) -> datetime | None:
    try:
        return datetime.strptime(name, _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def _empty_trash(store: Store, yes: bool, keep: timedelta) -> None:
    """Delete what has lain in the trash for longer than `keep`."""
    for name in _times(store):
        folder, time = store.sub(f"{TRASH}/{name}"), _time(name)
        if time is None or datetime.now(UTC) - time < keep:
            continue
        size = sum(entry.size for entry in folder.list())
        say(f"trash      {size / 2**20:10.1f} MiB  {folder.uri}{' deleted' if yes else ''}")
        if yes:
            folder.delete_all()


def _tell(size: int, yes: bool, trash: str, keep_days: float) -> None:
    mib = f"{size / 2**20:.1f} MiB"
    if not yes:
        say(f"{mib} could go; --yes {'moves it to trash/' if keep_days else 'deletes it'}")
    elif keep_days and size:
        say(f"{mib} moved to {trash}, for {keep_days:g} days; --restore COMPONENT/DIGEST brings one back")
    else:
        say(f"{mib} deleted")
