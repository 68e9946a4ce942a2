"""Checkpoints: whole or not there, of all ranks or of none, and never gone on from when a bit of them changed."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from components.contract import Folder, Lease, LeaseLost, StoreError, acquire, open_store
from components.contract.store.folder import FolderStore
from components.training import checkpoints, worker
from components.training.checkpoints import (
    COMMITTED,
    Checkpoint,
    CheckpointFolders,
    Damaged,
    Saver,
    newest_whole,
)
from components.training.run import Run
from llava.errors import LlavaError
from llava.training import checkpoint as files
from llava.training.checkpoint import PARTS, Fragment

NAME = "model.multi_modal_projector.linear_1.weight"


@pytest.fixture(params=["folder", "s3"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Folder, Lease]]:
    root = tmp_path / "root" if request.param == "folder" else request.getfixturevalue("s3_root")
    folder = open_store(root).sub("finetune/0123")
    with acquire(folder) as lease:
        yield folder, lease


def folders_of(held: tuple[Folder, Lease], keep: int = 2) -> CheckpointFolders:
    return CheckpointFolders(held[0], held[1].guard, keep)


def fragment(start: int, count: int) -> Fragment:
    values = torch.arange(start, start + count, dtype=torch.float32)
    return Fragment(NAME, start, {part: values + number * 1000 for number, part in enumerate(PARTS)})


ALONE: Any = SimpleNamespace(rank=0, world=1)
"""As much of an engine as one rank needs to agree with itself."""


def save(saver: Saver, step: int, more: dict[str, bytes] | None = None) -> Folder:
    position = files.position_json(files.Position(step, {"seed": 1}, step))
    return saver.save(step, [fragment(0, 10)], {files.STATE: position} | (more or {}))


def saver_of(
    folders: CheckpointFolders, tmp_path: Path, start: str = "aaaaaaaa", rank: int = 0, world: int = 1
) -> Saver:
    return Saver(folders, rank, world, start, tmp_path)


def committed(folders: CheckpointFolders) -> list[int]:
    return [int(folder.uri.rsplit("/", 1)[1][:9]) for folder in folders.newest_first()]


def flip(folder: Folder, key: str) -> None:
    """Change two bits in the middle of a file, and nothing else about it."""
    data = bytearray(folder.read(key))
    data[len(data) // 2] ^= 1
    data[-3] ^= 64
    folder.write(key, bytes(data))


def test_a_checkpoint_is_committed_when_every_rank_has_stored_its_share(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    folders = folders_of(held)
    first, second = (saver_of(folders, tmp_path, rank=rank, world=2) for rank in (0, 1))
    position = {files.STATE: files.position_json(files.Position(1, {"seed": 1}, 1))}
    first.save(1, [fragment(0, 6)], position)
    with pytest.raises(TimeoutError):
        first._pending.result(timeout=0.5)  # type: ignore[union-attr]
    assert committed(folders) == []
    second.save(1, [fragment(6, 4)], {"ids-00001.jsonl": b"{}\n"})
    for saver in (second, first):
        saver.wait()
        saver.close()
    assert committed(folders) == [1]
    found = Checkpoint(folders.newest_first()[0])
    state = found.state(found.position({"seed": 1}))
    for number, part in enumerate(PARTS):
        assert state.read(part, NAME, 4, 8).tolist() == [number * 1000 + each for each in (4, 5, 6, 7)]
        assert torch.equal(
            state.whole(part, NAME, torch.Size([2, 5])).flatten(), torch.arange(10.0) + number * 1000
        )
    state.close()
    assert {name.partition("-")[0] for name in found.files} == {*PARTS, "ids", "state.json"}


def test_the_newest_are_kept_and_training_goes_on_while_one_is_stored(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path)
    slow = threading.Event()
    slowly = saver._written
    saver._written = lambda *given: slow.wait(30) and slowly(*given)  # type: ignore[method-assign, assignment, return-value]
    save(saver, 1)
    assert committed(folders) == []
    threading.Timer(0.2, slow.set).start()
    for step in (2, 3, 4):
        save(saver, step)
        assert committed(folders)[0] == step - 1
    saver.wait()
    assert committed(folders) == [4, 3]
    saver.close()


@pytest.mark.parametrize("what", ["a tensor", "the record", "the marker", "a missing file", "a shorter file"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(
    held: tuple[Folder, Lease], tmp_path: Path, what: str
) -> None:
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path)
    saved = [save(saver, step, {"ids-00000.jsonl": b'{"step": 1}\n' * 9}) for step in (1, 2)]
    saver.wait()
    saver.close()
    tensors = files.file_of("exp_avg", 0, 1)
    if what == "a tensor":
        flip(saved[1], tensors)
    elif what == "the record":
        flip(saved[1], "ids-00000.jsonl")
    elif what == "the marker":
        saved[1].write(COMMITTED, saved[1].read(COMMITTED)[:-20])
    elif what == "a missing file":
        saved[1].delete(tensors)
    else:
        saved[1].write(tensors, saved[1].read(tensors)[:-1])
    told: list[str] = []
    found = newest_whole(folders, ALONE, told.append)
    assert found is not None and found.folder == saved[0]
    assert len(told) == 1 and "is damaged" in told[0] and told[0].endswith("going on from the one before")
    assert saved[1].uri in told[0]
    # It is out of the way, so that it counts for nothing and misleads nobody.
    assert list(saved[1].list()) == []
    flip(saved[0], tensors)
    assert newest_whole(folders, ALONE, told.append) is None
    assert told[1].endswith("starting from the beginning")


def test_a_marker_that_names_other_places_is_damaged(held: tuple[Folder, Lease], tmp_path: Path) -> None:
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path)
    folder = save(saver, 1)
    saver.wait()
    saver.close()
    for change in (
        {"../../else": [1, "0"]},
        {"/etc/passwd": [1, "0"]},
        {"weights": [-1]},
        {"weights": None},
        [],
    ):
        marker = json.loads(folder.read(COMMITTED))
        marker[0]["files"] = change
        folder.write(COMMITTED, json.dumps(marker).encode())
        with pytest.raises(Damaged):
            Checkpoint(folder)


def test_a_full_disk_leaves_nothing_of_the_checkpoint_and_says_so(tmp_path: Path) -> None:
    folder = open_store(tmp_path / "root").sub("finetune/0123")
    with acquire(folder) as lease:
        folders = CheckpointFolders(folder, lease.guard, 2)
        saver = saver_of(folders, tmp_path)
        save(saver, 1)
        saver.wait()
        there = folders.checkpoint(2, "aaaaaaaa")
        assert there.local_path is not None
        there.local_path.mkdir(parents=True)
        # A device that is always full stands for the last file, when the tensors are written.
        (there.local_path / files.STATE).symlink_to("/dev/full")
        save(saver, 2)
        with pytest.raises(LlavaError, match=r"No space left on device: make room, or .*keep_checkpoints"):
            saver.wait()
        assert not there.local_path.exists()
        assert committed(folders) == [1]
        saver.close()


def test_what_a_kill_left_unfinished_goes_when_the_next_group_starts(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path, "aaaaaaaa")
    save(saver, 1)
    saver.wait()
    saver.close()
    half = folders.checkpoint(2, "aaaaaaaa")
    half.write(files.file_of("weights", 1, 2), b"half a share")
    held[0].write("checkpoints/ray/state.json", b"not ours")
    folders.clean()
    assert list(half.list()) == [] and committed(folders) == [1]
    assert held[0].read("checkpoints/ray/state.json") == b"not ours"


def test_what_a_rank_wrote_is_read_when_it_comes_and_not_after_the_last(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    folders = folders_of(held)
    savers = [saver_of(folders, tmp_path, rank=rank, world=3) for rank in range(3)]
    read: list[int] = []
    came = threading.Event()
    share = savers[0]._share

    def noting(there: Folder, rank: int) -> files.Share:
        read.append(rank)
        if len(read) == 2:
            came.set()
        return share(there, rank)

    savers[0]._share = noting  # type: ignore[method-assign]
    save(savers[0], 1)
    savers[1].save(1, [], {})
    assert came.wait(20), "nothing was read before the last rank came"
    assert sorted(read) == [0, 1]
    savers[2].save(1, [], {})
    for saver in reversed(savers):
        saver.wait()
        saver.close()
    assert read[2:] == [2]
    assert committed(folders) == [1]


def test_two_starts_of_a_group_never_write_into_one_checkpoint(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    folders = folders_of(held)
    before = saver_of(folders, tmp_path, "bbbbbbbb", rank=1, world=2)
    before.save(5, [fragment(0, 10)], {})
    before.wait()
    after = saver_of(folders, tmp_path, "aaaaaaaa")
    save(after, 5)
    after.wait()
    for saver in (before, after):
        saver.close()
    assert committed(folders) == [5]
    assert Checkpoint(folders.newest_first()[0]).folder.uri.endswith("aaaaaaaa")


def test_a_run_that_lost_its_artifact_commits_no_checkpoint(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    _, lease = held
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path)
    written = saver._written

    def losing(*given: Any) -> Any:
        found = written(*given)
        lease.release()
        return found

    saver._written = losing  # type: ignore[method-assign]
    save(saver, 1)
    with pytest.raises(LeaseLost):
        saver.wait()
    assert committed(folders) == []
    saver.close()


def test_a_share_that_arrives_while_the_run_ends_is_waited_for(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    folders = folders_of(held)
    first, second = (saver_of(folders, tmp_path, rank=rank, world=2) for rank in (0, 1))
    save(first, 1)
    threading.Timer(0.5, lambda: second.save(1, [], {})).start()
    first.close()
    second.close()
    assert committed(folders) == [1]


def test_who_waits_for_shares_that_never_come_ends_with_the_run(
    held: tuple[Folder, Lease], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "ARRIVE", 0.3)
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path, world=2)
    save(saver, 1)
    saver.close()
    assert committed(folders) == []
    with pytest.raises(LlavaError, match="before all ranks had stored"):
        saver.wait()


class Away(FolderStore):
    """A store that does not answer where it is asked for a marker or to delete."""

    failing: ClassVar[set[str]] = set()

    def _away(self, what: str, key: str) -> None:
        if what in self.failing and (not key or COMMITTED in key or key.startswith("state")):
            raise StoreError(f"{self.uri}/{key} did not answer")

    def fetch(self, key: str, most: int | None = None) -> tuple[bytes, str] | None:
        self._away("read", key)
        return super().fetch(key, most)

    def delete_all(self, prefix: str = "") -> None:
        self._away("delete", prefix)
        super().delete_all(prefix)

    def sub(self, prefix: str) -> "Away":
        return Away(self._path(prefix.strip("/")))


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointFolders]:
    monkeypatch.setattr(Away, "failing", set())
    folder = Away(tmp_path / "root/finetune/0123")
    with acquire(folder) as lease:
        yield CheckpointFolders(folder, lease.guard, 1)


def test_a_store_that_is_away_for_a_moment_costs_no_checkpoint(
    away: CheckpointFolders, tmp_path: Path
) -> None:
    saver = saver_of(away, tmp_path)
    save(saver, 1)
    saver.wait()
    saver.close()
    Away.failing.add("read")
    with pytest.raises(StoreError, match="did not answer"):
        newest_whole(away, ALONE, pytest.fail)
    Away.failing.clear()
    assert committed(away) == [1]


def test_what_cannot_be_deleted_after_the_commit_costs_no_checkpoint(
    away: CheckpointFolders, tmp_path: Path
) -> None:
    saver = saver_of(away, tmp_path)
    save(saver, 1)
    saver.wait()
    Away.failing.add("delete")
    save(saver, 2)
    saver.wait()
    Away.failing.clear()
    assert committed(away) == [2]
    save(saver, 3)
    saver.wait()
    saver.close()
    assert committed(away) == [3]


def test_a_rank_that_fails_after_the_commit_takes_nothing_away(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    """Its share arrived, and the answer that said so was lost."""
    folders = folders_of(held, keep=1)
    first, second = (saver_of(folders, tmp_path, rank=rank, world=2) for rank in (0, 1))
    written = second._written

    def late(*given: Any) -> Any:
        share = written(*given)
        there: Folder = given[0]
        there.write(files.share_file(1), json.dumps(share.as_json()).encode())
        first.wait()
        raise StoreError("timed out")

    second._written = late  # type: ignore[method-assign]
    save(first, 1)
    second.save(1, [], {})
    with pytest.raises(StoreError, match="timed out"):
        second.wait()
    assert committed(folders) == [1]
    found = newest_whole(folders, ALONE, pytest.fail)
    assert found is not None
    for saver in (first, second):
        saver.close()


@pytest.mark.parametrize(
    "marker", ["[]", "{}", '[{"files": {}, "pieces": {"a": [0, 1]}}]', '[{"files": {}}]']
)
def test_a_marker_that_names_too_little_is_damaged(
    away: CheckpointFolders, tmp_path: Path, marker: str
) -> None:
    saver = saver_of(away, tmp_path)
    folder = save(saver, 1)
    saver.wait()
    saver.close()
    folder.write(COMMITTED, marker.encode())
    with pytest.raises(Damaged):
        Checkpoint(folder)


def test_a_failed_share_is_told_before_the_next_save(held: tuple[Folder, Lease], tmp_path: Path) -> None:
    saver = saver_of(folders_of(held), tmp_path)

    def fails(*given: Any) -> Any:
        raise StoreError("no answer")

    saver._written = fails  # type: ignore[method-assign]
    save(saver, 1)
    with pytest.raises(StoreError, match="no answer"):
        for _ in range(200):
            saver.check()
            time.sleep(0.02)
    saver.close()


def test_a_checkpoint_that_is_damaged_just_before_the_export_starts_the_group_again(
    held: tuple[Folder, Lease], tmp_path: Path
) -> None:
    """Nothing of it goes into the model, and no final failure is reported: the next start takes the one before."""
    folders = folders_of(held)
    saver = saver_of(folders, tmp_path)
    before, last = (save(saver, step) for step in (1, 2))
    saver.wait()
    saver.close()
    state: Any = SimpleNamespace(engine=ALONE)
    run = Run(state, {}, [])
    assert run._checked(last).folder == last
    flip(last, files.file_of("weights", 0, 1))
    with pytest.raises(Damaged, match=r"before the export: weights-.* has other contents"):
        run._checked(last)
    found = newest_whole(folders, ALONE, lambda told: None)
    assert found is not None and found.folder == before


@pytest.mark.parametrize("error", [StoreError("away"), Damaged("a bit flipped")])
def test_the_driver_hears_nothing_of_what_another_start_may_mend(
    monkeypatch: pytest.MonkeyPatch, error: LlavaError
) -> None:
    told: list[str] = []
    client = SimpleNamespace(failure=lambda: None, fail=lambda message, status: told.append(message))
    task: Any = SimpleNamespace(progress_actor=None, dataset=SimpleNamespace(uri="here"))
    monkeypatch.setattr(worker, "ProgressClient", lambda actor: client)

    def failing(given: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "_work", failing)
    with pytest.raises(type(error)):
        worker.work(task)
    assert told == []
    error = LlavaError("for good")
    with pytest.raises(LlavaError):
        worker.work(task)
    assert told == ["for good"]
