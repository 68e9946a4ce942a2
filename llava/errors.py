"""The errors that carry an exit status: what a command answers when it cannot or must not go on."""

import errno

_SYSTEM = frozenset(
    (
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ESTALE,
        errno.ETXTBSY,
    )
)


def from_the_system(error: BaseException) -> bool:
    """Whether the machine failed and no input: a full or broken disk, too many open files."""
    return isinstance(error, OSError) and error.errno in _SYSTEM


def from_a_store(error: BaseException) -> bool:
    """Whether S3 failed pyarrow, which says so in words only."""
    return isinstance(error, OSError) and "AWS Error" in str(error)


class LlavaError(Exception):
    """A failure with a message for the user: the thing, the place and the way out, in one line."""

    exit_status = 1


class RefusedInput(LlavaError):
    """Input that was refused before work started."""

    exit_status = 2


class BudgetReached(LlavaError):
    """A budget of tokens or money is used up; what is paid for is kept."""

    exit_status = 3


class Preempted(LlavaError):
    """The run was asked to stop and saved its state; the same command resumes it."""

    exit_status = 4


class Terminated(BaseException):
    """SIGTERM, SIGHUP or Ctrl-C reached the command; it leaves with the status of `Preempted`.

    No Exception: it comes up wherever the program happens to be, and nobody on its way may take it for a failure of
    what was just being done.
    """

    exit_status = Preempted.exit_status


class AlreadyRunning(LlavaError):
    """Somebody else holds this artifact; the message says who and since when."""

    exit_status = 5


class BadSample(LlavaError):
    """A sample that cannot be trained on. `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
