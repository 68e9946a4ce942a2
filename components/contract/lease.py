"""The lease on an unfinished artifact: one owner at a time, a dead owner's place is taken over.

`lease.json` in the artifact's folder names the owner, its process and its expiry. Every change is a compare
and swap, and every take-over raises the fencing token: an owner who slept too long learns that it lost.
Clocks of different hosts must agree to within a third of `ttl`; on one host the process itself is looked at.
"""

from __future__ import annotations

import functools
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated
from uuid import uuid4

import psutil
import pydantic
from pydantic import Field

from components.contract import outages
from components.contract.store import Folder, StoreError
from llava.errors import AlreadyRunning, LlavaError

LEASE = "lease.json"
_AFTER_A_RACE = 0.1
"""Seconds, at most, that one who lost a race for the lease steps back."""
TTL = 60.0
_LARGEST = 1 << 16  # bytes of a lease
_TRIES = 5
_HURRY = 5.0
"""Seconds, at least, that a renewal under way is waited for before the lease is let go."""


class LeaseLost(LlavaError):
    """Another owner took this artifact over; what this process still writes does not count."""


Seconds = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
"""Since 1970."""


class LeaseRecord(pydantic.BaseModel):
    """The contents of `lease.json`; times are seconds since 1970, `started` is seconds since the host's boot."""

    model_config = pydantic.ConfigDict(frozen=True)

    owner: str = Field(pattern="^[0-9a-z]{1,64}$")
    token: int = Field(ge=1, le=999_999_999_999)
    host: str = Field(max_length=300)
    process_space: str = Field(max_length=300)
    pid: int = Field(ge=1, le=1 << 31)
    started: float = Field(allow_inf_nan=False)
    since: Seconds
    expires: Seconds
    released: bool = False

    @property
    def who(self) -> str:
        """The owner in words."""
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} since {since} (owner {self.owner[:8]})"

    @property
    def free(self) -> bool:
        """Whether somebody else may take over now."""
        return self.released or self.expires < time.time() or self._owner_died()

    def _owner_died(self) -> bool:
        """True only if this process can see that the owner is gone: same host, same table of processes."""
        if (self.host, self.process_space) != (socket.gethostname(), _process_space()):
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(_started(process) - self.started) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Guard:
    """A lease's claim, for another process (a training worker): picklable, looks and never renews."""

    folder: Folder
    owner: str
    token: int

    def check(self) -> None:
        """Raise LeaseLost if the artifact has another owner by now."""
        self.holds(_read(self.folder))

    def holds(self, found: tuple[LeaseRecord, str] | None) -> tuple[LeaseRecord, str]:
        """Return `found` if it is this claim's record, else raise LeaseLost."""
        if found is None or (found[0].owner, found[0].token) != (self.owner, self.token) or found[0].released:
            holder = f"it is held by {found[0].who}" if found else "its lease is gone"
            raise LeaseLost(
                f"{self.folder.uri}: this run lost the artifact (fencing token {self.token}); {holder}. "
                "Nothing was committed; run the same command again to go on from what is there"
            )
        return found


class Lease:
    """A held lease, renewed by a thread every third of `ttl` until it is released."""

    def __init__(self, folder: Folder, owner: str, token: int, ttl: float) -> None:
        self.folder, self.owner, self.token, self.ttl = folder, owner, token, ttl
        self.guard = Guard(folder, owner, token)
        self._lost: LeaseLost | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {folder.uri}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the loss of the lease is known already; costs nothing."""
        return self._lost is not None

    def check_if_lost(self) -> None:
        """Raise LeaseLost where the thread that renews has found out; costs nothing."""
        if self._lost is not None:
            raise self._lost

    def check(self) -> None:
        """Renew now: on return the lease is ours for another `ttl` seconds. Raises LeaseLost if it is not."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            try:
                self._renew()
            except LeaseLost as lost:
                self._lost = lost
                raise

    def release(self, forget: bool = False) -> None:
        """Stop renewing and let go. `forget` removes the file too, which only a finished artifact allows:
        elsewhere the next owner must find the token in order to raise it."""
        self._stop.set()
        patience = max(_HURRY, outages.seconds())
        self._thread.join(patience)
        if not self._lock.acquire(timeout=patience):
            raise StoreError(f"{self.folder.uri}/{LEASE}: not returned, its store does not answer")
        try:
            if self._lost is None:
                self._let_go(forget)
        finally:
            self._lock.release()

    def _let_go(self, forget: bool) -> None:
        try:
            if forget:
                self._renew()
                self.folder.delete(LEASE)
            else:
                self._renew(released=True)
        except LeaseLost as lost:
            self._lost = lost
        self._lost = self._lost or LeaseLost(f"{self.folder.uri}: the lease was released")

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _renew(self, released: bool = False) -> None:
        for _ in range(_TRIES):
            record, version = self.guard.holds(_read(self.folder))
            record = record.model_copy(update={"expires": time.time() + self.ttl, "released": released})
            if not self.folder.swap(LEASE, _bytes(record), version):
                continue
            # A store that was away may have been waited for longer than what was written lasts.
            if released or record.expires - time.time() > self.ttl / 2:
                return
        self.guard.check()
        raise StoreError(f"{self.folder.uri}/{LEASE}: changed {_TRIES} times while being renewed; try again")

    def _keep(self) -> None:
        while not self._stop.wait(self.ttl / 3):
            try:
                self.check()
            except LeaseLost:
                return
            except (LlavaError, OSError):
                # A store that is away for a while: the next round, or whoever commits, finds out.
                continue


def acquire(
    folder: Folder,
    wait: bool = True,
    ttl: float = TTL,
    poll: float = 1.0,
    say: Callable[[str], None] | None = None,
    least: Callable[[], int] = lambda: 1,
) -> Lease:
    """Take the lease on the artifact in `folder`.

    While somebody else holds it: wait, asking every `poll` seconds and telling `say` who holds it, or, with
    `wait=False`, raise AlreadyRunning. `least` gives the least token for a new owner where no lease lies there.
    """
    told = ""
    while True:
        owner = uuid4().hex
        found = _read(folder)
        if found is None:
            token = least()
            if folder.create(LEASE, _bytes(_mine(owner, token, ttl))):
                return Lease(folder, owner, token, ttl)
            _step_back(poll)
            continue
        record, version = found
        if record.free:
            token = record.token + 1
            if folder.swap(LEASE, _bytes(_mine(owner, token, ttl)), version):
                if say and not record.released:
                    say(f"taking over {folder.uri} from {record.who}")
                return Lease(folder, owner, token, ttl)
            _step_back(poll)
            continue
        if not wait:
            raise AlreadyRunning(
                f"{folder.uri} is being made by {record.who}: wait for it, or stop it and run again"
            )
        if say and told != record.owner:
            say(f"waiting: {folder.uri} is being made by {record.who}")
            told = record.owner
        time.sleep(poll)


def _step_back(poll: float) -> None:
    """After a lost race: a moment of random length, so that racers do not meet again."""
    time.sleep(random.uniform(0.5, 1.0) * min(poll, _AFTER_A_RACE))


def holder(folder: Folder) -> LeaseRecord | None:
    """Who holds the artifact in `folder` now, or None if it may be taken."""
    found = _read(folder)
    return None if found is None or found[0].free else found[0]


def read_lease(folder: Folder) -> LeaseRecord | None:
    """The lease on the artifact in `folder`, free or not; None where there is none."""
    found = _read(folder)
    return None if found is None else found[0]


def _mine(owner: str, token: int, ttl: float) -> LeaseRecord:
    now = time.time()
    return LeaseRecord(
        owner=owner,
        token=token,
        host=socket.gethostname(),
        process_space=_process_space(),
        pid=os.getpid(),
        started=_started(psutil.Process()),
        since=now,
        expires=now + ttl,
    )


def _started(process: psutil.Process) -> float:
    # Since boot, because a corrected clock moves the time since 1970, and a living owner must not look dead.
    boot = psutil.boot_time()
    return process.create_time() - boot


def _read(folder: Folder) -> tuple[LeaseRecord, str] | None:
    found = folder.fetch(LEASE, _LARGEST)
    if found is None:
        return None
    try:
        return LeaseRecord.model_validate_json(found[0]), found[1]
    except pydantic.ValidationError:
        raise StoreError(
            f"{folder.uri}/{LEASE} is not a lease: if nothing is making this artifact, delete that file"
        ) from None


def _bytes(record: LeaseRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()


@functools.cache
def _process_space() -> str:
    """Names the table in which a pid means something: this boot of this machine, this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"boot at {psutil.boot_time():.0f}"
