"""A writer that slept for longer than its lease lasts changes nothing of what another finished meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from pydantic import Field

from components.contract import (
    Component,
    Job,
    Outcome,
    Settings,
    Tracking,
    Workspace,
    acquire,
    open_artifact,
    open_store,
    run_component,
    run_field,
    verify,
)
from components.contract.manifest import MANIFEST
from tests.support.repository import REPOSITORY

TTL = 1.0  # seconds
FILES = ("model/config.json", "model/weights", "train/part-00000.parquet", "notes.json")

STALE = """
import sys
sys.path.insert(0, sys.argv[1])
from components.contract import Tracking, Workspace, open_store
from components.contract.lease import LeaseLost
from tests.security.test_stale_writers import Written, WrittenSettings, make
try:
    make(sys.argv[2], sys.argv[3], who="stale", stop_at=sys.argv[4])
except LeaseLost as lost:
    print(f"lost: {lost}", flush=True)
    sys.exit(7)
"""


class WrittenSettings(Settings):
    """`stop_at`: before which file, or before the commit, the process stops itself."""

    what: str = Field("files", description="Recipe")
    who: str = run_field("", description="Who writes; it stands in every file")
    stop_at: str = run_field("", description="Where the process stops itself")


class Written(Component):
    """Writes four files, and leaves one that only it needs."""

    name: ClassVar[str] = "written"
    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = WrittenSettings
    on_ray: ClassVar[bool] = False

    stands: ClassVar[bool] = True

    def still_stands(self, artifact: Any, workspace: Workspace) -> bool:
        return self.stands

    def run(self, job: Job[Any]) -> None:
        for number, key in enumerate(FILES):
            stop(job.settings.stop_at, str(number))
            text = f"{key} by {job.settings.who}, number {number}".encode()
            job.folder.write(key, text)
        job.folder.write("checkpoints/own", b"mine")
        stop(job.settings.stop_at, "commit")


def stop(wanted: str, here: str) -> None:
    """As a machine that swaps, a container that is frozen or a laptop that sleeps would."""
    if wanted == here:
        os.kill(os.getpid(), signal.SIGSTOP)


def make(
    root: str, tracking: str, who: str, stop_at: str = "", component: Component | None = None
) -> Outcome:
    """The artifact, made or found."""
    workspace = Workspace(open_store(root), Tracking(tracking, "stale"), lease_ttl=TTL)
    settings = WrittenSettings(who=who, stop_at=stop_at)
    return run_component(component or Written(), settings, {}, workspace)


def stopped_writer(root: str, tracking: str, stop_at: str) -> subprocess.Popen[str]:
    """A process that began to make the artifact and is stopped where it says."""
    process = subprocess.Popen(
        [sys.executable, "-c", STALE, str(REPOSITORY), root, tracking, stop_at],
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None and time.monotonic() < deadline, "it must stop itself"
        time.sleep(0.05)
    return process


def go_on(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Let it run to its end: status and what it printed."""
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=90)
    return process.returncode, out


@pytest.mark.services
@pytest.mark.parametrize("stop_at", ["0", "2", "commit"])
def test_a_writer_that_slept_changes_nothing_of_what_another_finished(
    root: str, mlflow_db: str, stop_at: str
) -> None:
    process = stopped_writer(root, mlflow_db, stop_at)
    try:
        artifact = make(root, mlflow_db, who="new").artifact
        before = {key: artifact.folder.read(key) for key in FILES}
        status, out = go_on(process)
    finally:
        process.kill()
        process.wait()
    assert (status, out.startswith("lost: ")) == (7, True)
    found = open_artifact(artifact.uri)
    assert found.manifest == artifact.manifest
    assert {key: found.folder.read(key) for key in FILES} == before
    assert all(b" by new," in text for text in before.values())
    verify(found)


@pytest.mark.services
def test_what_is_made_again_is_no_place_of_an_owner_before(
    folder_root: str, mlflow_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(folder_root, mlflow_db, who="first").artifact
    monkeypatch.setattr(Written, "stands", False)
    second = make(folder_root, mlflow_db, who="second").artifact
    third = make(folder_root, mlflow_db, who="third").artifact
    assert len({one.folder.uri for one in (first, second, third)}) == 3
    keys = [entry.key for entry in first.address.list()]
    inside = third.folder.uri.removeprefix(f"{first.uri}/")
    assert sorted(keys) == sorted([MANIFEST, *(f"{inside}/{key}" for key in FILES)]), "the rest is gone"
    verify(third)


@pytest.mark.services
def test_each_owner_goes_on_from_the_files_of_the_one_before(root: str, mlflow_db: str) -> None:
    class Stops(Written):
        """Writes one file more than it finds, and stops; the fourth finishes."""

        seen: ClassVar[list[list[str]]] = []

        def run(self, job: Job[Any]) -> None:
            self.seen.append([key for key in FILES if job.folder.stat(key) is not None])
            missing = [key for key in FILES if job.folder.stat(key) is None]
            job.folder.write(missing[0], f"{job.settings.who}".encode())
            if len(missing) > 1:
                raise RuntimeError("cut short")

    Stops.seen.clear()
    for who in ("a", "b", "c"):
        with pytest.raises(RuntimeError):
            make(root, mlflow_db, who=who, component=Stops())
    artifact = make(root, mlflow_db, who="d", component=Stops()).artifact
    assert Stops.seen == [list(FILES[:number]) for number in range(4)]
    assert [artifact.folder.read(key).decode() for key in FILES] == ["a", "b", "c", "d"]
    assert len(list(artifact.address.list())) == len(FILES) + 1, "what others left is gone"
    local = artifact.local("model")
    assert (Path(local) / "config.json").read_text() == "a"
    verify(open_artifact(artifact.uri))


@pytest.mark.services
def test_a_take_over_that_was_cut_short_is_made_anew(folder_root: str, mlflow_db: str) -> None:
    process = stopped_writer(folder_root, mlflow_db, "2")
    process.kill()
    process.wait()
    (manifest_less,) = Path(folder_root).glob("written/*")
    # The second owner dies before the mark: what it had copied is no start.
    with acquire(open_store(manifest_less), ttl=TTL) as lease:
        half = manifest_less / "attempts" / f"{lease.token:06d}-{lease.owner[:8]}"
        (half / "model").mkdir(parents=True)
        (half / "model/config.json").write_text("half")
    seen: list[str] = []

    class Looks(Written):
        def run(self, job: Job[Any]) -> None:
            seen.extend(key for key in FILES if job.folder.stat(key) is not None)
            super().run(job)

    make(folder_root, mlflow_db, who="third", component=Looks())
    assert seen == list(FILES[:2])
