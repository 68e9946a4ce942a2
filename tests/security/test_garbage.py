"""Garbage collection takes nothing that anything refers to, and what it takes can be brought back."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from components.contract import Artifact, Store, Workspace, acquire, open_artifact, open_store, run_component
from components.contract.lease import LEASE
from components.register import Register, RegisterSettings
from llava.errors import AlreadyRunning, RefusedInput
from tests.workflows.test_prune import Made, TextSettings, registered, stage, stands, workspace
from workflows.prune import TRASH, prune, restore
from workflows.retraining.drops import Drop, take
from workflows.retraining.records import PLAN, VERSIONS, RetrainPlan

__all__ = ["workspace"]
pytestmark = pytest.mark.services
NOW = timedelta(0)
HEX = "0123456789abcdef" * 4


def everything(store: Store) -> set[str]:
    return {entry.key for entry in store.list()}


@pytest.fixture
def name() -> str:
    """Of a model whose first version is the test's own."""
    return f"same-{uuid4().hex[:8]}"


def register(workspace: Workspace, name: str, text: str) -> dict[str, Artifact]:
    """A model registered as `name`, like no other of the registry, which several tests share."""
    model = stage(workspace, "finetune", f"{name}-{text}")
    evaluation = stage(workspace, "evaluate", f"{name}-{text}", model=model)
    inputs = {"model": model, "evaluation": evaluation}
    made = run_component(Register(), RegisterSettings(name=name), inputs, workspace).artifact
    return {**inputs, "registration": made}


def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> str:
    """Another registry, which has a model of the same name and version, from another root."""
    uri = f"sqlite:///{tmp_path}/foreign.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model(name)
    client.create_model_version(name, str(tmp_path / "elsewhere" / "model"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.mark.parametrize("yes", [False, True])
def test_a_foreign_registry_with_a_model_of_that_name_deletes_nothing(
    workspace: Workspace, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yes: bool
) -> None:
    register(workspace, name, "a")
    stage(workspace, "finetune", "unreferred")
    before = everything(workspace.store)
    uri = foreign(monkeypatch, tmp_path, name)
    with pytest.raises(RefusedInput, match=f"{name}/1.* not in MLflow at {uri}.*nothing is deleted"):
        prune(workspace.store.uri, yes, NOW)
    assert everything(workspace.store) == before


def test_one_registration_that_is_missing_is_enough(workspace: Workspace, name: str) -> None:
    first, second = register(workspace, name, "a"), register(workspace, name, "b")
    client = MlflowClient(tracking_uri=workspace.tracking.uri, registry_uri=workspace.tracking.uri)
    client.delete_model_version(name, second["registration"].manifest.notes["model"]["version"])
    before = everything(workspace.store)
    with pytest.raises(RefusedInput, match=rf"{name}/2.*--gone {name}/2"):
        prune(workspace.store.uri, True, NOW)
    assert everything(workspace.store) == before
    prune(workspace.store.uri, True, NOW, gone=[f"{name}/2"])
    assert all(map(stands, first.values())) and not any(map(stands, second.values()))


def test_a_registry_that_knows_none_of_the_runs_deletes_nothing(
    workspace: Workspace, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(workspace, "finetune", "a")
    foreign(monkeypatch, tmp_path, name)
    with pytest.raises(RefusedInput, match="knows none of the 1 runs"):
        prune(workspace.store.uri, True, NOW)
    assert stands(made)


def test_what_a_drop_a_version_and_a_plan_name_stays_with_its_inputs(workspace: Workspace) -> None:
    store = workspace.store
    source = stage(workspace, "backbones", "source")
    shards, base = stage(workspace, "shard", "drop", of=source), stage(workspace, "instruct", "base")
    start, other = stage(workspace, "finetune", "start"), stage(workspace, "shard", "other")
    drop = Drop(uri="/in/monday", digest=HEX, files=3, size=10)
    take(store.uri, drop, {"contents": HEX, "datasets": [{"uri": shards.uri, "digest": shards.digest}]})
    take(store.uri, drop.model_copy(update={"digest": "f" * 64}), {"same_as": "/in/monday"})
    part = {"role": "base", "uri": base.uri, "digest": base.digest, "weight": 1.0}
    store.write(f"{VERSIONS}/{HEX[:16]}.json", json.dumps({"version": HEX, "parts": [part]}).encode())
    plan = RetrainPlan(drops=(drop,), contents={HEX: HEX}, start=start.uri)
    store.write(PLAN, plan.to_bytes())
    prune(store.uri, True, NOW)
    assert all(map(stands, (source, shards, base, start))) and not stands(other)


def test_what_an_unfinished_artifact_needs_stays_while_it_is_fresh(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Made):
        def run(self, job: Any) -> None:
            job.folder.write("checkpoints/7/state", b"hours of work")
            raise RuntimeError("preempted")

    source = stage(workspace, "instruct", "a")
    with pytest.raises(RuntimeError):
        run_component(Cut("finetune"), TextSettings(text="a"), {"dataset": source}, workspace)
    prune(workspace.store.uri, True, timedelta(minutes=10))
    assert stands(source) and [key for key in everything(workspace.store) if key.endswith("7/state")]
    later = time.time() + 3600
    monkeypatch.setattr("time.time", lambda: later)
    prune(workspace.store.uri, True, timedelta(seconds=-3600))
    assert not stands(source)


@pytest.mark.parametrize("where", ["finetune/0123456789abcdef", "retrain"])
def test_while_anything_is_made_nothing_goes(workspace: Workspace, where: str) -> None:
    made = stage(workspace, "finetune", "a")
    with acquire(workspace.store.sub(where)):
        with pytest.raises(AlreadyRunning, match="prune when nothing runs"):
            prune(workspace.store.uri, True, NOW)
        prune(workspace.store.uri, False, NOW)
    assert stands(made)


def test_what_went_lies_in_the_trash_for_its_days_and_can_be_brought_back(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, other = registered(workspace), stage(workspace, "finetune", "other")
    address = "/".join(other.uri.split("/")[-2:])
    root = workspace.store.uri
    prune(root, True, NOW)
    assert not stands(other) and not (Path(root) / address).exists()
    assert "--restore COMPONENT/DIGEST" in capsys.readouterr().err
    prune(root, True, NOW)
    restore(root, address)
    assert open_artifact(other.uri).manifest == other.manifest
    assert LEASE not in {entry.key for entry in other.address.list()}
    assert list((Path(root) / TRASH).iterdir()) == [], "no empty folder of that time is left"
    with pytest.raises(RefusedInput, match="lies there"):
        restore(root, address)
    prune(root, True, NOW)
    (time_of,) = (Path(root) / TRASH).iterdir()
    time_of.rename(time_of.with_name("20200101T000000Z"))
    (Path(root) / TRASH / "mine").mkdir()
    prune(root, True, NOW)
    assert [path.name for path in (Path(root) / TRASH).iterdir()] == ["mine"], (
        "a week is over; mine is not ours"
    )
    assert all(map(stands, kept.values()))


def test_keeping_nothing_deletes_at_once(workspace: Workspace) -> None:
    registered(workspace)
    other = stage(workspace, "finetune", "other")
    prune(workspace.store.uri, True, NOW, keep_days=0)
    assert not stands(other) and not list(workspace.store.list(f"{TRASH}/"))


@pytest.mark.parametrize("address", ["../elsewhere", "finetune", "finetune/xyz", "/etc/passwd"])
def test_restore_takes_no_path(workspace: Workspace, address: str) -> None:
    with pytest.raises(RefusedInput, match="give COMPONENT/DIGEST"):
        restore(workspace.store.uri, address)


def test_a_mistyped_root_is_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RefusedInput, match="there is no folder"):
        prune(str(tmp_path / "runz"), True, NOW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedInput, match="there is no MLflow database"):
        prune(str(tmp_path / "empty"), True, NOW)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]


DAMAGED = {
    "drops/x.json": [
        "[]",
        "{",
        '{"uri": "/in", "taken": "now"}',
        '{"uri": "\\u001b[2J", "taken": "2026-01-01"}',
    ],
    f"{VERSIONS}/x.json": ['{"version": "../x", "parts": []}', '{"version": "' + HEX + '", "parts": [{}]}'],
    PLAN: [
        '{"drops": [{"uri": 1}], "contents": {}, "start": null}',
        '{"drops": [], "contents": {}, "start": "a\\n"}',
    ],
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in DAMAGED.items() for text in texts])
def test_a_damaged_record_is_refused_by_name_and_nothing_is_deleted(
    workspace: Workspace, key: str, text: str
) -> None:
    made = stage(workspace, "finetune", "a")
    workspace.store.write(key, text.encode())
    with pytest.raises(RefusedInput, match=f"{key} is damaged"):
        prune(workspace.store.uri, True, NOW)
    assert stands(made)


def test_the_registry_of_a_root_on_s3_is_no_file_that_happens_to_lie_here(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    open_store(s3_root).write("finetune/0123456789abcdef/model/config.json", b"{}")
    with pytest.raises(RefusedInput, match=r"there is no MLflow database at .*runs/mlflow\.db"):
        prune(s3_root, True, NOW)
    assert not (tmp_path / "runs").exists()
