"""Attempts: every owner of an unfinished artifact writes at a place of its own, which only its manifest can name.

A lease keeps two owners apart as long as nobody sleeps. One that was stopped for longer than its lease lasts goes on as
if nothing had happened, and no check before a write helps: it may sleep between the check and the write. So the fencing
token is part of where one writes. The first owner writes into the artifact's folder itself, each later one into
`attempts/TOKEN-OWNER/`, and the manifest says which of them counts. No manifest names what a stale writer still writes.

The next owner goes on from what is there: it takes over the files of the attempt before, by hard links in a folder and
by copies within the store on S3, and then leaves a mark that all of them are there. A stale writer cannot reach a copy:
stores replace files, they do not write into them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from components.contract.lease import Lease
from components.contract.manifest import ATTEMPTS, MARKS, Manifest, attempt_folder
from components.contract.store import Entry, Folder

TAKEN_OVER = "taken-over"
"""In an attempt's place: all files of the attempt before lie here."""
_NAME = re.compile(rf"{ATTEMPTS}/(\d{{6,12}})-[0-9a-f]{{8}}")


def attempt_of(lease: Lease) -> str:
    """The name of the attempt that `lease` allows: "" for the first owner of an artifact."""
    return "" if lease.token == 1 else f"{ATTEMPTS}/{lease.token:06d}-{lease.owner[:8]}"


def next_token(manifest: Manifest | None) -> int:
    """The least token for a new owner, over that of the attempt which `manifest` names."""
    if manifest is None:
        return 1
    found = _NAME.fullmatch(manifest.attempt)
    return (int(found[1]) if found else 1) + 1


def files_of(address: Folder, attempt: str) -> Iterator[Entry]:
    """What lies at an attempt's place, keys relative to it, without what says how the artifact stands."""
    for entry in attempt_folder(address, attempt).list():
        other = not attempt and (entry.key in MARKS or entry.key.startswith(f"{ATTEMPTS}/"))
        if not other and entry.key != TAKEN_OVER:
            yield entry


def earlier(address: Folder, attempt: str) -> list[str]:
    """The attempts before `attempt` that have anything of their own, the newest first."""
    if not attempt:
        return []
    names = {"/".join(entry.key.split("/", 2)[:2]) for entry in address.list(f"{ATTEMPTS}/")}
    later = [name for name in sorted(names, reverse=True) if _NAME.fullmatch(name) and name < attempt]
    return [*(name for name in later if address.stat(f"{name}/{TAKEN_OVER}") is not None), ""]


def take_over(address: Folder, attempt: str, wanted: Callable[[str], bool], check: Callable[[], None]) -> int:
    """Copy those files of the newest attempt before `attempt` whose keys are `wanted` to its place; how many.

    `check` is called before each file and may raise. A file that its writer deletes meanwhile is left out. What that
    attempt itself had taken over is deleted where it came from, so that no file is there more than twice.
    """
    before = earlier(address, attempt)
    if not before:
        return 0
    origin, goal = attempt_folder(address, before[0]), attempt_folder(address, attempt)

    copied = goal.copy_all(origin, _wanted(address, before[0], wanted), check)
    goal.write(TAKEN_OVER, b"")
    for older in before[1:]:
        old = attempt_folder(address, older)
        for key in _wanted(address, older, wanted):
            old.delete(key)
    return copied


def _wanted(address: Folder, attempt: str, wanted: Callable[[str], bool]) -> list[str]:
    return [entry.key for entry in files_of(address, attempt) if wanted(entry.key)]


def remove_rest(address: Folder, manifest: Manifest) -> None:
    """Delete everything in a finished artifact's folder that its manifest does not name: attempts, checkpoints."""
    inside = f"{manifest.attempt}/" if manifest.attempt else ""
    named = {*MARKS, *(inside + file.path for file in manifest.files)}
    needed = {_branch(key, inside) for key in named} | {""}
    rest = [entry.key for entry in address.list() if entry.key not in named]
    for branch in sorted({_branch(key, inside) for key in rest} - needed):
        address.delete_all(branch)
    for key in rest:
        if _branch(key, inside) in needed:
            address.delete(key)


def _branch(key: str, inside: str) -> str:
    """The folder to delete as one: an attempt, one right under `inside` or the artifact; "" for a file."""
    if inside and key.startswith(inside):
        name, slash, _ = key.removeprefix(inside).partition("/")
        return inside + name if slash else ""
    folders = key.split("/")[:-1]
    return "/".join(folders[: 2 if folders[:1] == [ATTEMPTS] else 1])
