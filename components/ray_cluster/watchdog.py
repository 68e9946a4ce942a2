"""The end of a local cluster: a small process that outlives the command and leaves nothing of it behind.

It runs alone, without the package: `python watchdog.py PID FOLDER`. It waits until the process PID is gone, or until
its standard input ends. Then it kills every process of the cluster and removes FOLDER, which only this cluster uses.
A command that leaves by itself says so with one byte. One that does not was killed, or Ray ended it: the watchdog says
so in its place, on the standard error that they share.

A process belongs to the cluster if it was started with FOLDER in the variable `LLAVA_CLUSTER`, or has a file of FOLDER
open. Its name and its parent do not count: Ray's processes change the one and lose the other.
"""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "LLAVA_CLUSTER"
"""The environment variable that names the folder of the cluster to which a process belongs."""
TOLD = b"."
"""What the command writes to the watchdog before it leaves: how it ended is told."""
_UNTOLD = (
    b"error: the command is gone: it was killed (kill -9, or no memory left), or its Ray cluster was; the same "
    b"command goes on from what is kept\n"
)
_SECONDS = 60.0
_PROC = Path("/proc")


def end(folder: str, spare: frozenset[int] = frozenset()) -> None:
    """Kill all processes of the cluster in `folder` but those in `spare`, and remove the folder."""
    deadline, quiet = time.monotonic() + _SECONDS, 0
    # A process may start another while it dies: twice nobody is nobody.
    while quiet < 2 and time.monotonic() < deadline:
        left = [pid for pid in members(folder) if pid not in spare]
        for pid in left:
            _kill(pid, folder)
        quiet = 0 if left else quiet + 1
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def members(folder: str) -> Iterator[int]:
    """Pids of the cluster in `folder`, without this process; of those of this user, as far as /proc tells."""
    for entry in _PROC.glob("[0-9]*"):
        if int(entry.name) != os.getpid() and _belongs(entry, folder):
            yield int(entry.name)


def _belongs(process: Path, folder: str) -> bool:
    with suppress(OSError):
        if f"{MARK}={folder}\0".encode() in (process / "environ").read_bytes():
            return True
        # Ray's workers write their title over their environment, and keep their logs open.
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()).startswith(f"{folder}/"):
                    return True
    return False


def _kill(pid: int, folder: str) -> None:
    """SIGKILL, unless the number belongs to another process by now."""
    with suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if _belongs(_PROC / str(pid), folder):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _wait_for(pid: int) -> bool:
    """Until the process `pid` is gone, or says that it leaves; whether it has said so."""
    waiting, told = select.poll(), sys.stdin.fileno()
    waiting.register(told, select.POLLIN | select.POLLHUP)
    with suppress(OSError):
        waiting.register(os.pidfd_open(pid), select.POLLIN)
    waiting.poll()
    os.set_blocking(told, False)
    try:
        return os.read(told, 1) == TOLD
    except BlockingIOError:  # gone, while another process holds the pipe
        return False


def _main(pid: int, folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not _wait_for(pid):
        with suppress(OSError):  # a terminal that is closed
            os.write(2, _UNTOLD)
    end(folder, spare=frozenset((pid,)))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
