"""The private folder of a local cluster, and the watchdog that ends the cluster and removes it."""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from components.ray_cluster import watchdog
from llava.errors import RefusedInput

RAY = "r"
"""Ray's own folder inside: Ray gives it to everybody (mode 0777), the folder around it is closed (0700)."""
_PREFIX, _LOCK = "llava-", "lock"
_LONGEST_SOCKET = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_AF_UNIX = 107  # bytes of a socket's path
_NEW_SECONDS = 60.0
_END_SECONDS = 90.0


class ClusterFolder:
    """A folder of this command's own, with a lock that lasts as long as the command or its watchdog."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        base = _base()
        _remove_dead(base)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self.ray = self.path / RAY
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # In a session of its own no terminal and no batch system takes it down with the command.
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={},
            cwd="/",
            pass_fds=(lock,),
            start_new_session=True,
        )
        os.close(lock)

    def told(self) -> None:
        """Say to the watchdog that the command leaves by itself: without this it tells of a command that was killed."""
        assert self._watchdog.stdin is not None
        if self._watchdog.stdin.closed:
            return
        with suppress(OSError):  # somebody killed the watchdog
            os.write(self._watchdog.stdin.fileno(), watchdog.TOLD)

    def end(self) -> None:
        """End what is left of the cluster and remove the folder; returns when it is done."""
        if os.getpid() != self._owner:
            return  # a forked child
        self.told()
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(_END_SECONDS)
        if self.path.exists():  # somebody killed the watchdog
            watchdog.end(str(self.path))


def _base() -> Path:
    """Where the folder is made: `RAY_TMPDIR`, or the first short one of the usual places."""
    named = os.environ.get("RAY_TMPDIR")
    for place in [named] if named else [tempfile.gettempdir(), "/tmp", "/var/tmp"]:
        path = Path(place).absolute()
        room = _AF_UNIX - len(os.fsencode(path)) - len(f"/{_PREFIX}12345678/{RAY}") - _LONGEST_SOCKET
        if room >= 0 and os.access(path, os.W_OK | os.X_OK):
            return path
    raise RefusedInput(
        f"{named or tempfile.gettempdir()}: Ray needs a folder with a short path (its sockets' paths have at most "
        f"{_AF_UNIX} bytes) that can be written: set RAY_TMPDIR to one, such as /tmp"
    )


def _remove_dead(base: Path) -> None:
    """End what commands left whose watchdog was killed with them."""
    for folder in base.glob(f"{_PREFIX}????????"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            path = folder / _LOCK
            if time.time() - path.stat(follow_symlinks=False).st_mtime < _NEW_SECONDS:
                continue  # its owner may not hold the lock yet
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # This process has the lock open, as the dead cluster's had their files.
                watchdog.end(str(folder), spare=frozenset((os.getpid(),)))
            finally:
                os.close(lock)
