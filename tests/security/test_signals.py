"""Whatever ends a command, nothing of it or of its own cluster is left, and it says why in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from components.ray_cluster import folder as folders
from components.ray_cluster import starting, watchdog
from llava.errors import LlavaError, RefusedInput
from tests.support.signalled import Signalled

SOON = 10.0  # seconds


def _command(running: Signalled) -> None:
    running.process.kill()


def _named(name: str) -> Callable[[Signalled], None]:
    return lambda running: running.until_there(name).kill()


def _errors(running: Signalled) -> list[str]:
    return [line for line in running.err.splitlines() if line.startswith("error: ")]


def _everything(running: Signalled) -> None:
    for one in running.left():
        with suppress(psutil.Error):  # some go with those that were killed before them
            if "watchdog.py" not in " ".join(one.cmdline()):
                one.kill()


@pytest.mark.services
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGHUP, "SIGHUP"),
        pytest.param(signal.SIGTERM, "SIGTERM", marks=pytest.mark.drill),
        pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.drill),
    ],
)
def test_a_signal_while_the_cluster_works_leaves_nothing(number: signal.Signals, told: str) -> None:
    with Signalled() as running:
        running.until("ready")
        (private,) = running.folders()
        assert private.stat().st_mode & 0o777 == 0o700
        running.process.send_signal(number)
        assert running.wait() == 4
        assert (
            running.err
            == f"error: stopped by {_TOLD[told]}; the same command goes on from the last checkpoint\n"
        )
        assert running.left_after(SOON) == []
        assert running.folders() == []


_TOLD = {"SIGHUP": "SIGHUP (a closed terminal)", "SIGTERM": "SIGTERM", "Ctrl-C": "Ctrl-C"}


@pytest.mark.services
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(_command, id="command"),
        pytest.param(_named("raylet/raylet"), id="raylet", marks=pytest.mark.drill),
        pytest.param(_named("gcs_server"), id="head", marks=pytest.mark.drill),
        pytest.param(_everything, id="everything", marks=pytest.mark.drill),
    ],
)
def test_kill_9_leaves_nothing(kill: Callable[[Signalled], None]) -> None:
    with Signalled() as running:
        running.until("ready")
        kill(running)
        assert running.wait() != 0
        assert running.left_after(SOON) == []
        assert running.folders() == []
        assert len(_errors(running)) == 1, running.err


@pytest.mark.drill
def test_what_is_left_where_the_watchdog_was_killed_is_ended_by_the_next_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Signalled() as running:
        running.until("ready")
        running.until_there("watchdog.py").kill()
        running.process.kill()
        assert running.wait() == -signal.SIGKILL
        monkeypatch.setattr(folders, "_NEW_SECONDS", 0.0)
        monkeypatch.setenv("RAY_TMPDIR", str(running.folder))
        ours = folders.ClusterFolder()
        assert running.left_after(SOON) == [] or all("watchdog.py" in one for one in running.left_after(0))
        assert running.folders() == [ours.path]
        ours.end()
        assert running.folders() == []


@pytest.mark.services
@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT, signal.SIGINT],
        pytest.param([signal.SIGTERM], marks=pytest.mark.drill),
        pytest.param([signal.SIGHUP], marks=pytest.mark.drill),
    ],
)
@pytest.mark.parametrize(
    "moment",
    [
        "raylet/raylet",
        pytest.param("starting", marks=pytest.mark.drill),
        pytest.param("gcs_server", marks=pytest.mark.drill),
    ],
)
def test_a_signal_while_ray_starts_is_one_line(numbers: list[signal.Signals], moment: str) -> None:
    with Signalled() as running:
        running.until("starting")
        if moment != "starting":
            running.until_there(moment)
        for number in numbers:
            running.process.send_signal(number)
            time.sleep(0.05)
        assert running.wait() == 4
        assert running.err.startswith("error: stopped by ") and running.err.count("\n") == 1, running.err
        assert running.left_after(SOON) == []
        assert running.folders() == []


@pytest.mark.services
def test_ray_that_does_not_start_in_time_is_one_line() -> None:
    with Signalled(seconds=8.0) as running:
        running.until_there("gcs_server").send_signal(signal.SIGSTOP)
        assert running.wait() == 1
        assert running.err.count("\n") == 1, running.err
        assert "Ray does not start on this machine (no answer in 8 s)" in running.err
        assert running.left_after(SOON) == []
        assert running.folders() == []


@pytest.mark.drill
def test_a_raylet_that_does_not_answer_for_a_minute_costs_only_that_minute() -> None:
    """As on a machine that swaps, or sleeps: Ray by itself takes the node for dead, and ends the command."""
    with Signalled() as running:
        running.until("ready")
        raylet = running.until_there("raylet/raylet")
        raylet.send_signal(signal.SIGSTOP)
        time.sleep(75)
        raylet.send_signal(signal.SIGCONT)
        time.sleep(15)
        worked = running.out.count("worked")
        running.until("worked\n" * (worked + 5))
        assert running.process.poll() is None, running.err


@pytest.mark.services
@pytest.mark.parametrize("listens", [False, True])
def test_a_ray_address_that_nobody_answers_is_one_line(listens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listens:
            server.close()
        began = time.monotonic()
        with Signalled(seconds=8.0, RAY_ADDRESS=f"127.0.0.1:{port}") as running:
            assert running.wait() == (1 if listens else 2)
            assert time.monotonic() - began < 60
            assert running.err.count("\n") == 1 and f"RAY_ADDRESS=127.0.0.1:{port}: no" in running.err, (
                running.err
            )


@pytest.mark.parametrize(
    "address", ["nonsense", "host:", ":6379", "host:x", "host:0", "host:70000", "ray://host"]
)
def test_a_ray_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(RefusedInput, match="give host:port"):
        starting.probe(address)


def test_a_start_that_fails_or_hangs_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy() -> None:
        os.write(2, b"seventy lines\n" * 70)
        raise RuntimeError("no room\nand more")

    with pytest.raises(
        LlavaError, match=r"^Ray does not start \(no room\); Ray's own words are in (\S+)$"
    ) as told:
        starting.in_time(noisy, 5, "Ray does not start")
    assert capfd.readouterr().err == ""
    log = Path(str(told.value).rpartition(" ")[2])
    assert log.read_text().startswith("seventy lines")
    log.unlink()
    with pytest.raises(LlavaError, match=r"\(no answer in 0 s\)") as told:
        starting.in_time(lambda: time.sleep(1), 0.1, "Ray does not start")
    Path(str(told.value).rpartition(" ")[2]).unlink()
    # Another test's command, in this process, would leave at once while a start is under way.
    while starting.unfinished():
        time.sleep(0.05)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[folders.ClusterFolder]:
    made = folders.ClusterFolder()
    yield made
    made.end()


def _member(cluster: folders.ClusterFolder, by: str) -> subprocess.Popen[bytes]:
    """A process in a session of its own that belongs to the cluster by its environment, or by a file."""
    with (cluster.path / f"{by}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(100)"],
            env={watchdog.MARK: str(cluster.path)} if by == "mark" else {},
            stdout=log if by == "file" else None,
            start_new_session=True,
        )


def test_the_watchdog_ends_members_by_mark_and_by_file_and_nobody_else(
    cluster: folders.ClusterFolder,
) -> None:
    members = [_member(cluster, by) for by in ("mark", "file")]
    other = subprocess.Popen(
        ["sleep", "100"], env={watchdog.MARK: f"{cluster.path}x"}, start_new_session=True
    )
    try:
        assert cluster.path.stat().st_mode & 0o777 == 0o700
        cluster.end()
        assert [one.wait(SOON) for one in members] == [-signal.SIGKILL] * 2
        assert other.poll() is None
        assert not cluster.path.exists()
    finally:
        other.kill()
        other.wait()


def test_a_long_temporary_folder_is_passed_over_and_one_that_is_named_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    made = folders.ClusterFolder()
    made.end()
    assert made.path.parent in (Path("/tmp"), Path("/var/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    with pytest.raises(RefusedInput, match="short path"):
        folders.ClusterFolder()
