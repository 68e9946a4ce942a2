"""The lease: one owner, a dead one replaced at once, a slept one fenced off."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from components.contract import Guard, LeaseLost, acquire, holder, open_store
from components.contract.lease import LEASE
from components.contract.store import FolderStore, Store, StoreError
from llava.errors import AlreadyRunning

HOLD = """
import sys, time
from components.contract import acquire, open_store
lease = acquire(open_store(sys.argv[1]), poll=0.02, ttl=float(sys.argv[2]))
print(lease.token, flush=True)
time.sleep(float(sys.argv[3]))
lease.release()
"""


def _holder_process(uri: str, ttl: float = 60.0, seconds: float = 60.0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri, str(ttl), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process


def _token_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def _edit(folder: Store, **values: object) -> None:
    folder.write(LEASE, json.dumps(json.loads(folder.read(LEASE)) | values).encode())


def test_second_runner_is_told_who_holds_it(root: str) -> None:
    folder = open_store(root)
    with acquire(folder), pytest.raises(AlreadyRunning) as refusal:
        acquire(folder, wait=False)
    assert f"process {os.getpid()} on " in str(refusal.value) and "since" in str(refusal.value)


def test_waiting_runner_gets_it_on_release_with_the_next_token(root: str) -> None:
    folder = open_store(root)
    first = acquire(folder)
    said: list[str] = []
    threading.Timer(0.3, first.release).start()
    with acquire(folder, poll=0.05, say=said.append) as second:
        assert (first.token, second.token) == (1, 2)
        assert len(said) == 1 and said[0].startswith("waiting:")
    assert holder(folder) is None


def test_killed_holder_on_this_host_is_replaced_at_once(root: str) -> None:
    folder = open_store(root)
    process = _holder_process(root, ttl=600)
    try:
        assert _token_of(process) == 1
        with pytest.raises(AlreadyRunning):
            acquire(folder, wait=False)
        process.send_signal(signal.SIGKILL)
        started = time.monotonic()
        with acquire(folder, poll=0.05) as lease:
            assert lease.token == 2
        assert time.monotonic() - started < 3
    finally:
        process.kill()
        process.wait()


def test_of_processes_racing_for_a_dead_holders_place_one_gets_it(root: str) -> None:
    dead = _holder_process(root)
    racers: list[subprocess.Popen[str]] = []
    try:
        _token_of(dead)
        racers = [_holder_process(root, seconds=0.2) for _ in range(3)]
        time.sleep(1.0)
        dead.send_signal(signal.SIGKILL)
        # Each holds it for a while and hands it on: no token is given out twice.
        assert sorted(_token_of(racer) for racer in racers) == [2, 3, 4]
    finally:
        for process in (dead, *racers):
            process.kill()
            process.wait()


def test_reused_pid_is_not_taken_for_the_owner(folder_root: str) -> None:
    folder = open_store(folder_root)
    lease = acquire(folder)
    _edit(folder, started=json.loads(folder.read(LEASE))["started"] - 100)
    with acquire(folder, wait=False) as second:
        assert second.token == lease.token + 1


def test_foreign_owner_keeps_it_until_expiry(root: str) -> None:
    folder = open_store(root)
    acquire(folder)
    _edit(folder, host="elsewhere", pid=999_999_999, expires=time.time() + 0.5, owner="other")
    with pytest.raises(AlreadyRunning, match="elsewhere"):
        acquire(folder, wait=False)
    with acquire(folder, poll=0.05) as lease:
        assert lease.token == 2


def test_same_pid_of_another_container_proves_nothing(folder_root: str) -> None:
    folder = open_store(folder_root)
    acquire(folder)
    _edit(folder, process_space="another boot or namespace", pid=999_999_999, owner="other")
    with pytest.raises(AlreadyRunning):
        acquire(folder, wait=False)


def test_renewal_keeps_it_past_its_ttl(root: str) -> None:
    folder = open_store(root)
    with acquire(folder, ttl=0.6):
        time.sleep(1.2)
        assert json.loads(folder.read(LEASE))["expires"] > time.time()
        with pytest.raises(AlreadyRunning):
            acquire(folder, wait=False)


def test_after_a_take_over_the_old_owner_is_fenced_off(root: str) -> None:
    folder = open_store(root)
    old = acquire(folder, ttl=600)
    old.check()
    _edit(folder, expires=0.0)
    new = acquire(folder, wait=False)
    with pytest.raises(LeaseLost, match="fencing token 1"):
        old.check()
    assert old.lost
    old.release()
    new.check()
    assert holder(folder) is not None, "the old owner's release leaves the new one's lease alone"
    new.release()


def test_guard_tells_a_worker_process_of_the_loss(root: str) -> None:
    folder = open_store(root)
    lease = acquire(folder)
    guard: Guard = pickle.loads(pickle.dumps(lease.guard))
    guard.check()
    _edit(folder, expires=0.0)
    with acquire(folder), pytest.raises(LeaseLost):
        guard.check()


def test_release_of_a_finished_artifact_leaves_no_file(root: str) -> None:
    folder = open_store(root)
    acquire(folder).release(forget=True)
    assert list(folder.list()) == []


def test_damaged_lease_names_the_file(tmp_path: Path) -> None:
    folder = open_store(tmp_path)
    folder.write(LEASE, b"{}")
    with pytest.raises(StoreError, match=r"lease\.json"):
        acquire(folder)


class Busy(FolderStore):
    """A folder in which somebody else is always a moment faster, and gone when one looks."""

    tries = 0

    def create(self, key: str, data: bytes) -> bool:
        type(self).tries += 1
        return False

    def fetch(self, key: str, most: int | None = None) -> tuple[bytes, str] | None:
        if self.tries > 200:
            raise StoreError("200 tries")
        return None


def test_a_race_that_is_lost_again_and_again_is_not_run_without_a_pause(tmp_path: Path) -> None:
    store = Busy(tmp_path)
    began = time.monotonic()

    def lose() -> None:
        with contextlib.suppress(StoreError):
            acquire(store, poll=0.2)

    racer = threading.Thread(target=lose, daemon=True)
    racer.start()
    racer.join(1.0)
    Busy.tries, tries = 1000, Busy.tries
    racer.join(5)
    assert tries <= 20 * (time.monotonic() - began), f"{tries} tries in a second"
