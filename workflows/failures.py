"""How a command ends that failed: one line, a status, and a log with the traceback of what nobody expected."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from components.contract import printable
from components.contract.secrets import redacted
from llava.errors import LlavaError, RefusedInput, Terminated, from_a_store

FAILED, REFUSED = LlavaError.exit_status, RefusedInput.exit_status
KEPT, LONGEST = 20, 2000
"""Logs of failures that stay; characters of a line."""
TRACEBACK, LOGS = "LLAVA_TRACEBACK", "LLAVA_LOG_DIR"
_NO_DISK_AFTERWARDS = ("CI", "KUBERNETES_SERVICE_HOST")

_ADVICE = {
    errno.ENOSPC: "make room and run the same command again",
    errno.EDQUOT: "make room and run the same command again",
    errno.EFBIG: "raise the limit on the size of files and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
    errno.ENFILE: "raise the limit on open files and run the same command again",
    errno.EACCES: "give a path that you may use",
    errno.EPERM: "give a path that you may use",
    errno.EROFS: "give a path that you may write to",
    errno.ENAMETOOLONG: "give a shorter path",
}
_OF_INPUT = frozenset(
    (
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    )
)
_KNOWN = {
    ("pyarrow.lib", "ArrowException"): (REFUSED, "data that cannot be read"),
    ("safetensors", "SafetensorError"): (REFUSED, "weights that cannot be read"),
    ("zipfile", "BadZipFile"): (REFUSED, "a damaged zip file"),
    ("tarfile", "TarError"): (REFUSED, "a damaged tar file"),
    ("zlib", "error"): (REFUSED, "damaged compressed data"),
    ("torch", "OutOfMemoryError"): (
        FAILED,
        "not enough memory on the GPU; `llava estimate` says what is needed",
    ),
    ("ray.exceptions", "OutOfMemoryError"): (FAILED, "not enough memory for a worker; set fewer workers"),
    ("ray.exceptions", "OutOfDiskError"): (FAILED, "no room on a node's disk for Ray's objects"),
}
"""Errors of libraries by module and class: the status, and what they are about. Only loaded modules are asked."""


def tell(error: BaseException) -> int:
    """Print the one line about `error` on standard error; the exit status."""
    cause = _cause(error)
    trace = "".join(traceback.format_exception(error))
    expected = _expected(cause)
    if _wanted(unexpected=expected is None) and not isinstance(cause, Terminated):
        _say(trace)
    if expected is not None:
        line, status = expected
        _say(line if len(str(cause)) <= LONGEST else f"{line[:LONGEST]} ...; {_logged(trace)}")
        return status
    _say(f"unexpected {_line(type(cause).__name__, str(cause))[:LONGEST]}; {_logged(trace)}")
    return FAILED


def _cause(error: BaseException) -> BaseException:
    """What happened: Ray puts what a task raised, and what a signal raised inside its compiled calls, into others."""
    for _ in range(10):
        inner = getattr(error, "cause", None)
        if isinstance(error, SystemError) and isinstance(error.__cause__, LlavaError | Terminated):
            error = error.__cause__
        elif isinstance(inner, BaseException) and type(error).__module__.startswith("ray."):
            error = inner
        else:
            break
    return error


def _expected(error: BaseException) -> tuple[str, int] | None:
    """Line and status of a failure of the outside world; None for any other."""
    if isinstance(error, LlavaError | Terminated):
        return _line(str(error)), error.exit_status
    if isinstance(error, MemoryError):
        return _line("not enough memory", str(error)), FAILED
    if isinstance(error, OSError) and error.errno:
        return _of_system(error), REFUSED if error.errno in _OF_INPUT else FAILED
    if from_a_store(error):
        return _line("S3", str(error), "run the same command again once it answers"), FAILED
    for (module, name), (status, about) in _KNOWN.items():
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(error, kind):
            return _line(about, str(error)), status
    return None


def _of_system(error: OSError) -> str:
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    what = os.strerror(error.errno) if isinstance(error.errno, int) else str(error)
    advice = _ADVICE.get(error.errno or 0, "")
    line = _line(" -> ".join(named) or error.strerror or "", what)
    return f"{line}; {advice}" if advice else line


def _line(*parts: str) -> str:
    """The parts in one line; the same is not said twice."""
    texts = [" ".join(part.split()) for part in parts]
    return ": ".join(dict.fromkeys(text for text in texts if text))


def _logged(trace: str) -> str:
    """Where the traceback is; where no file can be written it is printed."""
    try:
        return f"the traceback is in {_write(trace)}"
    except OSError as failed:
        if not _wanted(unexpected=True):
            _say(trace)
        return f"the traceback is printed, since a log cannot be written: {_of_system(failed)}"


def _wanted(unexpected: bool) -> bool:
    """Whether a traceback is printed too: asked for, or `unexpected` where nobody finds a log afterwards."""
    asked = os.environ.get(TRACEBACK)
    if asked is not None:
        return asked not in ("", "0")
    return unexpected and any(os.environ.get(name) for name in _NO_DISK_AFTERWARDS)


def log_folder() -> Path:
    """Where logs of failures lie: `LLAVA_LOG_DIR`, else the user's folder for the state of programs."""
    if chosen := os.environ.get(LOGS):
        return Path(chosen)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state, "llava-workflow", "logs").expanduser()


def _write(text: str) -> Path:
    """A new file that its owner alone can read."""
    folder = log_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    descriptor, path = tempfile.mkstemp(".log", f"llava-{stamp}-", folder)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"llava {' '.join(sys.argv[1:2])}, Python {sys.version.split()[0]}\n{text}")
    for old in sorted(folder.glob("llava-*.log"))[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return Path(path)


def _say(text: str) -> None:
    text = redacted(text)
    with contextlib.suppress(OSError):
        print(
            f"error: {printable(text)}" if "\n" not in text else printable(text), file=sys.stderr, flush=True
        )


def flush() -> None:
    """Bring what was printed to where it goes. Raises `OSError`, as for a full disk, that names standard output."""
    try:
        sys.stdout.flush()
    except OSError as failed:
        # What is still in the buffer would fail again when Python ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(failed.errno, failed.strerror, "standard output") from None
