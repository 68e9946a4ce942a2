"""Ray's start in a thread: the command keeps its signals, has a deadline, and hears what failed in one line."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

from components.contract.printable import one_line
from llava.errors import LlavaError, RefusedInput, Terminated

START_SECONDS = 180.0
"""For a local cluster: a busy machine starts slowly."""
JOIN_SECONDS = 60.0
PROBE_SECONDS = 10.0
"""How long a port of `RAY_ADDRESS` is tried before Ray is."""

_HELD = threading.Event()
_unfinished: set[threading.Thread] = set()


def in_time(start: Callable[[], object], seconds: float, failed: str) -> None:
    """Run `start` in a thread; LlavaError, which begins with `failed`, where it fails or takes longer than `seconds`.

    What Ray writes to standard error meanwhile goes to a file that the message names.
    """
    with _errors_in_a_file() as log:
        try:
            _in_thread(start).result(seconds)
        except (LlavaError, Terminated):
            raise
        # SystemExit: Ray leaves so where it lacks a token.
        except (Exception, SystemExit) as error:
            late = isinstance(error, TimeoutError) and not str(error)
            reason = f"no answer in {seconds:.0f} s" if late else one_line(error)
            raise LlavaError(f"{failed} ({reason}); Ray's own words are in {log.keep()}") from error
    _take_signals_back()


def _take_signals_back() -> None:
    """Ray's compiled parts put a handler of their own before Python's, which prints a stack for SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            handler = signal.getsignal(number)
            if callable(handler):
                signal.signal(number, handler)


def _in_thread(start: Callable[[], object]) -> Future[None]:
    """`start` in a thread that stays until the process ends: Linux ends the processes that it started with it."""
    done: Future[None] = Future()

    def run() -> None:
        # Nobody in the cluster hears that the terminal was closed: the command does, and saves first.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            start()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        _unfinished.discard(threading.current_thread())
        _HELD.wait()

    thread = threading.Thread(target=run, name="ray-start", daemon=True)
    _unfinished.add(thread)
    thread.start()
    return done


def unfinished() -> bool:
    """Whether a thread is still inside a start: the process must not take the interpreter down around it."""
    return bool(_unfinished)


def probe(address: str) -> None:
    """RefusedInput where nobody listens at `address` (`host:port` or `ray://host:port`) for `PROBE_SECONDS`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise RefusedInput(
            f"RAY_ADDRESS={address}: give host:port of a cluster's head, such as 10.0.0.1:6379"
        )
    end, reason = time.monotonic() + PROBE_SECONDS, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.5, max(0.0, end - time.monotonic())))
    raise RefusedInput(
        f"RAY_ADDRESS={address}: nobody answers there ({reason}, tried for {PROBE_SECONDS:.0f} s): start that "
        "cluster or correct the address; without RAY_ADDRESS the command starts Ray on this machine"
    )


class _Log:
    """A file that is removed unless somebody wants to keep it."""

    def __init__(self) -> None:
        self.descriptor, self.path = tempfile.mkstemp(prefix="llava-ray-", suffix=".log")
        self._kept = False

    def keep(self) -> str:
        """Its path; the file stays."""
        self._kept = True
        return self.path

    def close(self) -> None:
        os.close(self.descriptor)
        if not self._kept:
            Path(self.path).unlink()


@contextmanager
def _errors_in_a_file() -> Iterator[_Log]:
    """What this process and Ray's compiled parts in it write to standard error goes to a file."""
    log = _Log()
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(log.descriptor, 2)
    try:
        yield log
    finally:
        with suppress(ValueError, OSError):
            sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        log.close()
