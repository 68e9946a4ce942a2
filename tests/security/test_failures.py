"""How a command ends when the world fails: one line and a status; a traceback only where somebody looks for it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import safetensors
import torch
from ray.exceptions import RayTaskError

from llava.errors import AlreadyRunning, LlavaError, RefusedInput, Terminated
from tests.support.command import SETTINGS_OF_OTHERS, llava
from workflows import cli, failures

Ending = Callable[[BaseException], tuple[int, str]]


@pytest.fixture
def ending(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Ending]:
    """Status and standard error of a command that raises something."""
    for name in SETTINGS_OF_OTHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLAVA_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def ends(error: BaseException) -> tuple[int, str]:
        def app() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), capsys.readouterr().err

    yield ends


def of_a_task(error: Exception) -> RayTaskError:
    """As `ray.get` raises it."""
    return RayTaskError("work", "Traceback of the worker", error).as_instanceof_cause()


EXPECTED = {
    "S3 that failed pyarrow": (
        OSError(
            "When reading information for key 'x': AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 7"
        ),
        1,
        "S3: When reading information for key 'x': AWS Error NETWORK_CONNECTION",
    ),
    "disk full": (
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        1,
        "/data/x: No space left on device; make",
    ),
    "quota": (
        OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"),
        1,
        "/data/x: Disk quota exceeded; make room",
    ),
    "disk full without a name": (
        OSError(errno.ENOSPC, "No space left on device"),
        1,
        "No space left on device; make",
    ),
    "disk full in pyarrow": (
        OSError(errno.ENOSPC, "Error writing bytes to file"),
        1,
        "Error writing bytes to file: No",
    ),
    "broken disk": (OSError(errno.EIO, "Input/output error", "/data/x"), 1, "/data/x: Input/output error"),
    "too many files": (OSError(errno.EMFILE, "Too many open files", "/data/x"), 1, "ulimit -n"),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "/data/x"),
        2,
        "/data/x: Permission denied",
    ),
    "read-only": (
        OSError(errno.EROFS, "Read-only file system", "/data/x"),
        2,
        "/data/x: Read-only file system",
    ),
    "not there": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x"),
        2,
        "/data/x: No such file",
    ),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "/data/x"), 2, "/data/x: Is a directory"),
    "long name": (
        OSError(errno.ENAMETOOLONG, "File name too long", "x"),
        2,
        "x: File name too long; give a shorter",
    ),
    "two names": (
        OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"),
        1,
        "/a -> /b: Invalid cross",
    ),
    "a name in bytes": (
        OSError(errno.ENOSPC, "No space left on device", b"/data/\xff"),
        1,
        "No space left on device",
    ),
    "memory": (MemoryError(), 1, "not enough memory"),
    "memory of a GPU": (
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        1,
        "not enough memory on the GPU",
    ),
    "Arrow": (pa.ArrowInvalid("two\nlines"), 2, "two lines"),
    "weights": (safetensors.SafetensorError("cut off"), 2, "weights that cannot be read: cut off"),
    "zip": (zipfile.BadZipFile("no zip"), 2, "a damaged zip file: no zip"),
    "compressed": (zlib.error("Error -3"), 2, "damaged compressed data: Error -3"),
    "refused": (RefusedInput("no\nway"), 2, "error: no way\n"),
    "failed": (LlavaError("it failed"), 1, "error: it failed\n"),
    "running": (AlreadyRunning("it runs"), 5, "error: it runs\n"),
    "terminated": (Terminated("stopped"), 4, "error: stopped\n"),
    "disk full in a task": (
        of_a_task(OSError(errno.ENOSPC, "No space left on device", "/data/x")),
        1,
        "/data/x: No space",
    ),
    "refused in a task": (of_a_task(RefusedInput("no way")), 2, "error: no way\n"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_failure_of_the_outside_world_is_one_line(name: str, ending: Ending, tmp_path: Path) -> None:
    error, status, line = EXPECTED[name]
    left, err = ending(error)
    assert (left, err.count("\n"), err.startswith("error: ")) == (status, 1, True), err
    assert line in err and err.isprintable() is False and err[:-1].isprintable()
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("two\nlines"), AssertionError(), OSError("no number")]
)
def test_what_nobody_expected_is_a_line_that_names_a_private_log(
    error: Exception, ending: Ending, tmp_path: Path
) -> None:
    status, err = ending(error)
    assert (status, err.count("\n")) == (1, 1) and err.startswith(f"error: unexpected {type(error).__name__}")
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in err
    assert stat.S_IMODE(log.stat().st_mode) == 0o600 and stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    assert "Traceback (most recent call last)" in log.read_text() and type(error).__name__ in log.read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("LLAVA_TRACEBACK", "1"), ("CI", "true"), ("KUBERNETES_SERVICE_HOST", "x")]
)
def test_a_traceback_is_printed_where_it_is_wanted_or_nobody_finds_the_log(
    name: str, value: str, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    status, err = ending(RuntimeError("boom"))
    assert status == 1 and "Traceback (most recent call last)" in err
    assert err.strip().splitlines()[-1].startswith("error: unexpected RuntimeError: boom")
    monkeypatch.setenv("LLAVA_TRACEBACK", "0")
    assert "Traceback" not in ending(RuntimeError("boom"))[1]


@pytest.mark.parametrize(
    ("name", "printed"), [("LLAVA_TRACEBACK", True), ("CI", False), ("KUBERNETES_SERVICE_HOST", False)]
)
def test_a_refusal_has_a_traceback_only_where_it_is_asked_for(
    name: str, printed: bool, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert (ending(RefusedInput("no way"))[1].count("\n") > 1) is printed


def test_a_log_that_cannot_be_written_is_no_second_failure(
    ending: Ending, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAVA_LOG_DIR", str(tmp_path / "file" / "logs"))
    status, err = ending(RuntimeError("boom"))
    assert status == 1 and "Traceback (most recent call last)" in err
    assert "cannot be written" in err.strip().splitlines()[-1]


def test_logs_do_not_pile_up(ending: Ending, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for number in range(40):
        (tmp_path / "logs" / f"llava-20200101T0000{number:02}Z-1.log").write_text("old")
    (tmp_path / "logs" / "mine.txt").write_text("not one of ours")
    ending(RuntimeError("boom"))
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert len(names) == failures.KEPT + 1 and names[-1] == "mine.txt" and "2020" not in names[-2]


def test_a_message_of_many_lines_is_cut_and_kept_whole_in_the_log(ending: Ending, tmp_path: Path) -> None:
    status, err = ending(LlavaError("the workers failed:\n" + "Traceback of a worker\n" * 500))
    assert (status, err.count("\n")) == (1, 1) and len(err) < 3000
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text().count("Traceback of a worker") == 500


def test_control_characters_of_a_message_reach_no_terminal(ending: Ending) -> None:
    assert "\x1b" not in ending(RefusedInput("\x1b]0;owned\x07"))[1]
    assert "\x1b" not in ending(RuntimeError("\x1b[2J"))[1]


@pytest.mark.slow
def test_standard_output_that_is_full_is_one_line(tmp_path: Path) -> None:
    code = "from workflows.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "estimate", "tiny", "--json"],
            cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
            env={**os.environ, "LLAVA_LOG_DIR": str(tmp_path / "logs")},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("No space left on device; make room and run the same command again\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.services
def test_a_disk_that_is_full_is_one_line(small_disk: Path, tmp_path: Path) -> None:
    ended = llava("backbones", "tiny", "--root", small_disk / "root", cwd=tmp_path, seconds=240)
    assert ended.status in (1, 2), ended.err
    assert "No space left on device" in ended.line or "full" in ended.line
    assert "Traceback" not in ended.err


@pytest.mark.services
@pytest.mark.parametrize("limit", [20_000, 700_000])
def test_files_that_may_not_grow_are_one_line(limit: int, tmp_path: Path) -> None:
    """Smaller than MLflow's database, and smaller than a model."""
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    ended = llava("backbones", "tiny", "--root", "root", cwd=tmp_path, before=before, seconds=240)
    assert ended.status in (1, 2), ended.err
    assert ended.line.startswith("error: ") and "Traceback" not in ended.err, ended.err
