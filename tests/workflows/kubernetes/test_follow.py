"""`llava submit --watch`: states and log of a run, to its own status."""

import threading
from collections.abc import Callable

import pytest

from tests.support.kubernetes.api_server import ApiServer, Fault
from tests.support.kubernetes.submitting import NAME, TRAIN, Command, last


def _follow(llava: Command, act: Callable[[], None]) -> tuple[int, str, str]:
    actor = threading.Thread(target=act)
    actor.start()
    try:
        return llava(*TRAIN, "--watch")
    finally:
        actor.join(30)


def test_watch_tells_states_and_log_over_cut_streams(llava: Command, server: ApiServer) -> None:
    lines = [f"2026-11-23T02:31:{n // 2:02d}.000000000Z shard: line {n}" for n in range(12)]

    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.set_status(NAME, jobDeploymentStatus="Initializing")
        server.pods["submitter"] = lines
        server.pod_labels["submitter"] = {"batch.kubernetes.io/job-name": NAME}
        server.lines_before_a_cut = 5
        server.cut_watches()
        # Missed by the watch that was cut: seen when the object is read again.
        server.set_status(NAME, jobDeploymentStatus="Running", jobStatus="RUNNING")
        assert server.watched.acquire(timeout=20)
        server.fail("GET", Fault(503))
        server.cut_watches()
        assert server.watched.acquire(timeout=20)
        server.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    status, out, err = _follow(llava, act)
    assert status == 0, err
    printed = [line for line in out.splitlines() if line.startswith("shard")]
    assert printed == [f"shard: line {n}" for n in range(12)]
    assert f"{NAME}: Running, RUNNING" in err
    assert f"{NAME}: Complete, SUCCEEDED" in err
    assert sum(each.startswith("WATCH") for each in server.requests) == 3


@pytest.mark.parametrize(
    ("message", "expected"), [("exit code 2, last logs", 2), ("exit code 4", 4), ("out of memory", 1)]
)
def test_watch_ends_with_the_runs_own_status(
    llava: Command, server: ApiServer, message: str, expected: int
) -> None:
    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.set_status(NAME, jobDeploymentStatus="Failed", jobStatus="FAILED", message=message)

    status, _, err = _follow(llava, act)
    assert (status, message in last(err)) == (expected, True)


def test_watch_of_a_run_that_somebody_deletes_says_so(llava: Command, server: ApiServer) -> None:
    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.delete(NAME)

    status, _, err = _follow(llava, act)
    assert (status, "deleted while it was" in last(err)) == (1, True)


def test_watch_without_the_right_to_read_logs_still_tells_states(llava: Command, server: ApiServer) -> None:
    def act() -> None:
        assert server.watched.acquire(timeout=20)
        server.pods["submitter"] = ["2026-11-23T02:31:00Z hello"]
        server.pod_labels["submitter"] = {"batch.kubernetes.io/job-name": NAME}
        server.fail("LOG", *[Fault(403, "cannot get pods/log")] * 9)
        threading.Event().wait(0.3)
        server.set_status(NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")

    status, _, err = _follow(llava, act)
    assert status == 0, err
    assert err.count("no log: ") == 1 and "cannot get pods/log" in err
