"""Running a component: made once, found again, resumed after any end, never committed by two."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any
from uuid import uuid4

import pytest

from components.contract import (
    LeaseLost,
    Outcome,
    TrackedRun,
    Tracking,
    TrackingError,
    Workspace,
    acquire,
    open_store,
    run_component,
)
from components.contract.lease import LEASE
from components.contract.runner import RUN
from llava.errors import AlreadyRunning, LlavaError, Preempted, RefusedInput
from tests.support.counting import Count, CountSettings
from tests.support.repository import REPOSITORY

RUN_AND_HANG = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.support.counting import Count, CountSettings
from components.contract import Tracking, Workspace, open_store, run_component
workspace = Workspace(open_store(sys.argv[2]), Tracking(sys.argv[3], sys.argv[4]))
run_component(Count(), CountSettings(stop_after=2, stop_by="hang"), {}, workspace)
"""


@pytest.fixture
def tracking(mlflow_db: str) -> Tracking:
    return Tracking(mlflow_db, f"test-{uuid4().hex[:8]}")


@pytest.fixture
def workspace(root: str, tracking: Tracking) -> Workspace:
    return Workspace(open_store(root), tracking, parent=tracking.start("workflow"))


@pytest.fixture
def on_folder(folder_root: str, tracking: Tracking) -> Workspace:
    return Workspace(open_store(folder_root), tracking, parent=tracking.start("workflow"))


def _count(workspace: Workspace, **settings: Any) -> Outcome:
    return run_component(Count(), CountSettings(**settings), {}, workspace)


def _mlflow(tracking: Tracking) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.uri)


def _children(workspace: Workspace) -> list[Any]:
    runs = _mlflow(workspace.tracking).search_runs([workspace.tracking.experiment_id])
    return [run for run in runs if run.data.tags.get("component") == "count"]


def _folder_of(workspace: Workspace) -> Any:
    keys = [entry.key for entry in workspace.store.list("count/")]
    (address,) = {key.split("/")[1] for key in keys}
    return workspace.store.sub(f"count/{address}")


def test_first_run_makes_the_artifact_and_its_mlflow_run(workspace: Workspace) -> None:
    outcome = _count(workspace)
    manifest = outcome.artifact.manifest
    assert not outcome.reused and outcome.seconds > 0
    assert outcome.artifact.uri == f"{workspace.store.uri}/count/{manifest.digest[:16]}"
    names = [entry.key for entry in outcome.artifact.folder.list()]
    assert names == ["data/part-0", "data/part-1", "data/part-2", "manifest.json"], "no lease, no checkpoints"
    assert [file.path for file in manifest.files] == names[:3]
    assert manifest.recipe == {"parts": 3} and manifest.run["stop_after"] == -1
    assert manifest.external == {"world": "1"} and manifest.notes == {"dropped": {"too large": ["id-1"]}}
    assert {"python", "torch", "mlflow"} <= set(manifest.versions) and manifest.code
    (child,) = _children(workspace)
    assert workspace.parent is not None
    assert child.info.run_id == manifest.mlflow_run_id and child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == workspace.parent.id
    assert child.data.tags["digest"] == manifest.digest
    assert child.data.metrics == {"count/parts": 3.0} and child.data.params["count.parts"] == "3"


def test_second_run_is_a_no_op_linked_to_its_parent(workspace: Workspace) -> None:
    first = _count(workspace)
    workspace.parent = workspace.tracking.start("another workflow")
    component = Count()
    second = run_component(component, CountSettings(), {}, workspace)
    assert second.reused and component.runs == 0
    assert second.artifact.manifest == first.artifact.manifest
    assert len(_children(workspace)) == 1
    tags = _mlflow(workspace.tracking).get_run(workspace.parent.id).data.tags
    assert tags["reused.count"] == f"{first.artifact.manifest.mlflow_run_id} {first.artifact.digest}"


def test_run_fields_leave_the_artifact_the_same_and_recipe_fields_do_not(on_folder: Workspace) -> None:
    first = _count(on_folder)
    assert _count(on_folder, declare=True).reused
    assert _count(on_folder, parts=2).artifact.digest != first.artifact.digest


def test_inputs_are_lineage(on_folder: Workspace) -> None:
    source = _count(on_folder).artifact
    outcome = run_component(Count(), CountSettings(parts=1), {"data": source}, on_folder)
    assert outcome.artifact.manifest.inputs == {"data": source.digest}
    run = _mlflow(on_folder.tracking).get_run(outcome.artifact.manifest.mlflow_run_id)
    (logged,) = run.inputs.dataset_inputs
    assert (
        source.digest.startswith(logged.dataset.digest)
        and json.loads(logged.dataset.source)["uri"] == source.uri
    )


def test_failed_run_is_resumed_under_the_same_mlflow_run(workspace: Workspace) -> None:
    with pytest.raises(RuntimeError, match="doom"):
        _count(workspace, stop_after=2)
    (failed,) = _children(workspace)
    assert failed.info.status == "FAILED" and "doom" in failed.data.tags["error"]
    assert workspace.store.sub(f"count/{failed.data.tags['digest'][:16]}").stat("manifest.json") is None
    component = Count()
    outcome = run_component(component, CountSettings(), {}, workspace)
    assert component.written == ["data/part-2"], "the finished parts stay"
    (child,) = _children(workspace)
    assert child.info.run_id == failed.info.run_id == outcome.artifact.manifest.mlflow_run_id
    assert child.info.status == "FINISHED"


def test_preempted_run_is_killed_not_failed(on_folder: Workspace) -> None:
    with pytest.raises(Preempted):
        _count(on_folder, stop_after=0, stop_by="preempted")
    (child,) = _children(on_folder)
    assert child.info.status == "KILLED"


def test_run_killed_with_its_process_is_resumed(on_folder: Workspace) -> None:
    tracking = on_folder.tracking
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            RUN_AND_HANG,
            str(REPOSITORY),
            on_folder.store.uri,
            tracking.uri,
            tracking.experiment,
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        on_folder.wait = False
        with pytest.raises(AlreadyRunning, match=f"process {process.pid} on"):
            _count(on_folder)
        process.kill()
        on_folder.wait = True
        component = Count()
        outcome = run_component(component, CountSettings(), {}, on_folder)
    finally:
        process.kill()
        process.wait()
    assert component.written == ["data/part-2"]
    (child,) = _children(on_folder)
    assert child.info.run_id == outcome.artifact.manifest.mlflow_run_id and child.info.status == "FINISHED"


def test_of_two_at_once_one_makes_it_and_the_other_uses_it(workspace: Workspace) -> None:
    outcomes: list[Outcome] = []
    _ = workspace.tracking.experiment_id
    threads = [threading.Thread(target=lambda: outcomes.append(_count(workspace))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.reused for outcome in outcomes) == [False, True]
    assert len(_children(workspace)) == 1


def test_refused_settings_leave_nothing(on_folder: Workspace) -> None:
    with pytest.raises(RefusedInput, match=r"count\.parts is -1"):
        _count(on_folder, parts=-1)
    assert _children(on_folder) == []
    assert [entry.key for entry in on_folder.store.list() if not entry.key.endswith(LEASE)] == []


def test_run_that_lost_its_lease_commits_nothing(workspace: Workspace) -> None:
    class Slept(Count):
        def run(self, job: Any) -> None:
            super().run(job)
            record = json.loads(job.folder.read(LEASE))
            job.folder.write(LEASE, json.dumps(record | {"expires": 0.0}).encode())
            self.usurper = acquire(job.folder, wait=False)

    component = Slept()
    with pytest.raises(LeaseLost):
        run_component(component, CountSettings(), {}, workspace)
    folder = _folder_of(workspace)
    assert folder.stat("manifest.json") is None
    assert folder.stat("checkpoints/step-0/state") is not None, (
        "the new owner's checkpoints are not ours to delete"
    )
    component.usurper.check()
    component.usurper.release()


def test_declared_hashes_are_taken_and_declared_sizes_compared(on_folder: Workspace) -> None:
    class Wrong(Count):
        def run(self, job: Any) -> None:
            super().run(job)
            job.add_file("data/part-0", 9_999, "0" * 64)

    with pytest.raises(LlavaError, match="data/part-0 was written with 9,999 bytes, found 7"):
        run_component(Wrong(), CountSettings(), {}, on_folder)
    kept = _folder_of(on_folder).stat("checkpoints/step-0/state")
    assert kept is not None, "a commit that fails must leave what the next try goes on from"
    artifact = _count(on_folder, declare=True).artifact
    declared = artifact.manifest.files
    assert declared[2].sha256 == artifact.folder.sha256("data/part-2")
    assert not [entry.key for entry in _folder_of(on_folder).list() if "checkpoints/" in entry.key]
    assert not [file.path for file in declared if file.path.startswith("checkpoints/")]


def test_artifact_that_no_longer_stands_is_made_again(on_folder: Workspace) -> None:
    class Gone(Count):
        stands = False

    first = _count(on_folder)
    component = Gone()
    second = run_component(component, CountSettings(), {}, on_folder)
    assert component.runs == 1 and not second.reused
    assert second.artifact.manifest.mlflow_run_id != first.artifact.manifest.mlflow_run_id


def test_mlflow_run_that_a_crash_left_open_is_closed_by_the_next_use(on_folder: Workspace) -> None:
    manifest = _count(on_folder).artifact.manifest
    assert manifest.mlflow_run_id is not None
    folder = _folder_of(on_folder)
    folder.write(RUN, json.dumps({"mlflow_run_id": manifest.mlflow_run_id}).encode())
    folder.write("checkpoints/step-2/state", b"the crash came before they were removed")
    on_folder.tracking.resume(manifest.mlflow_run_id)
    assert _count(on_folder).reused
    assert list(folder.list("checkpoints/")) == []
    assert _mlflow(on_folder.tracking).get_run(manifest.mlflow_run_id).info.status == "FINISHED"
    assert folder.stat(RUN) is None


def test_run_whose_mlflow_run_is_unknown_here_gets_a_new_one(on_folder: Workspace, mlflow_db: str) -> None:
    with pytest.raises(RuntimeError):
        _count(on_folder, stop_after=1)
    folder = _folder_of(on_folder)
    folder.write(RUN, json.dumps({"mlflow_run_id": uuid4().hex}).encode())
    assert _count(on_folder).artifact.manifest.mlflow_run_id in {
        child.info.run_id for child in _children(on_folder) if child.info.status == "FINISHED"
    }


def test_commit_stands_when_mlflow_goes_away_at_the_end(
    on_folder: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Last(Count):
        def run(self, job: Any) -> None:
            super().run(job)
            monkeypatch.setenv("LLAVA_OUTAGE_SECONDS", "0")
            self.real, job.run.uri = job.run.uri, "http://127.0.0.1:9"

    component = Last()
    outcome = run_component(component, CountSettings(), {}, on_folder)
    assert outcome.artifact.folder.stat("manifest.json") is not None
    assert "its MLflow run is not closed" in capsys.readouterr().err
    assert _count(on_folder).reused
    (child,) = _children(on_folder)
    assert child.info.status == "FINISHED" and child.data.metrics == {"count/parts": 3.0}


def test_an_interrupt_while_mlflow_is_away_ends_at_once(on_folder: Workspace) -> None:
    class Interrupted(Count):
        def run(self, job: Any) -> None:
            job.run.uri = "http://127.0.0.1:9"
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_component(Interrupted(), CountSettings(), {}, on_folder)
    assert time.monotonic() - started < 10


def test_cluster_is_joined_only_to_make_what_needs_it(on_folder: Workspace) -> None:
    class Alone(Count):
        on_ray = False

    joined: list[str] = []
    on_folder.cluster = lambda: joined.append("joined")
    run_component(Alone(), CountSettings(parts=1), {}, on_folder)
    assert joined == []
    for _ in range(2):
        _count(on_folder, parts=2)
    assert joined == ["joined"], "a finished artifact needs no cluster"


def test_folder_root_with_a_tracking_server_is_refused_before_start(folder_root: str) -> None:
    with pytest.raises(RefusedInput, match="register models from local folders"):
        Workspace(open_store(folder_root), Tracking("http://127.0.0.1:9")).check()


def test_a_time_to_wait_that_is_no_number_is_refused_before_start(
    on_folder: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_OUTAGE_SECONDS", "2 min")
    with pytest.raises(RefusedInput, match=r"LLAVA_OUTAGE_SECONDS=2 min: give seconds, from 0 to 86400"):
        on_folder.check()


def test_workspace_check_passes_on_working_servers(s3_root: str, mlflow_uri: str) -> None:
    started = time.monotonic()
    Workspace(open_store(s3_root), Tracking(mlflow_uri, f"test-{uuid4().hex[:8]}")).check()
    assert time.monotonic() - started < 20


@pytest.mark.services
def test_absent_mlflow_stops_the_run_with_its_uri(folder_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_OUTAGE_SECONDS", "0")
    workspace = Workspace(
        open_store(folder_root),
        Tracking("http://127.0.0.1:9"),
        parent=TrackedRun.attach("http://127.0.0.1:9", "x"),
    )
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9"):
        _count(workspace)
