"""What prune may delete: only what no version comes from, and nothing that a run may need next."""

from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from pydantic import Field

from components.contract import (
    Artifact,
    Component,
    Job,
    Settings,
    Tracking,
    Workspace,
    open_store,
    run_component,
)
from components.register import Register, RegisterSettings
from components.scoring.benchmarks import Files
from components.scoring.outcomes import files_note
from llava.data.jsonl import to_jsonl
from llava.errors import RefusedInput
from workflows.prune import prune

METRIC = "eval/vqa/exact_match"
NOW, LATER = timedelta(0), timedelta(minutes=10)


class TextSettings(Settings):
    text: str = Field(description="Anything")


class Made(Component):
    """Stands where a stage stands."""

    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = TextSettings

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def run(self, job: Job) -> None:
        job.folder.write("model/config.json", b"{}")
        job.metrics[METRIC] = 50.0
        row = {"id": "1", "question": "?", "expected": "yes", "answers": {"right_image": "yes"}}
        job.folder.write("answers.jsonl", to_jsonl([row]))
        exam = {"benchmark": "vqa", "digest": "exam", "folder": "", "scores": {"exact_match": 100.0}}
        job.notes["exams"] = {"vqa": exam | {"files": files_note(Files(answers=Path("answers.jsonl")))}}


@pytest.fixture
def workspace(folder_root: str, mlflow_db: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_db)
    return Workspace(open_store(folder_root), Tracking(mlflow_db, "prune", str(tmp_path / "mlflow")))


def stage(workspace: Workspace, name: str, text: str, **inputs: Artifact) -> Artifact:
    return run_component(Made(name), TextSettings(text=text), inputs, workspace).artifact


def registered(workspace: Workspace) -> dict[str, Artifact]:
    """A model's whole line, registered."""
    made: dict[str, Any] = {"backbones": stage(workspace, "backbones", "a")}
    made["model"] = stage(workspace, "finetune", "a", model=made["backbones"])
    made["evaluation"] = stage(workspace, "evaluate", "a", model=made["model"])
    inputs = {"model": made["model"], "evaluation": made["evaluation"]}
    settings = RegisterSettings(name=f"tiny-{uuid4().hex[:8]}")
    made["registration"] = run_component(Register(), settings, inputs, workspace).artifact
    return made


def stands(artifact: Artifact) -> bool:
    return artifact.folder.stat("manifest.json") is not None


def test_what_a_version_comes_from_stays_and_the_rest_goes(workspace: Workspace) -> None:
    kept = registered(workspace)
    other = stage(workspace, "finetune", "b", model=kept["backbones"])
    prune(workspace.store.uri, True, NOW)
    assert all(stands(artifact) for artifact in kept.values())
    assert not stands(other)


def test_a_version_whose_registration_was_cut_short_keeps_its_model(workspace: Workspace) -> None:
    kept = registered(workspace)
    kept.pop("registration").folder.delete("manifest.json")
    prune(workspace.store.uri, True, NOW)
    assert all(stands(artifact) for artifact in kept.values())


def test_what_was_finished_a_moment_ago_stays_with_its_inputs(workspace: Workspace) -> None:
    source = stage(workspace, "backbones", "c")
    between = stage(workspace, "pretrain", "c", model=source)
    prune(workspace.store.uri, True, LATER)
    assert stands(between) and stands(source)
    prune(workspace.store.uri, True, NOW)
    assert not stands(between) and not stands(source)


def test_a_registry_that_knows_no_version_of_the_root_deletes_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = registered(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(RefusedInput, match="set MLFLOW_TRACKING_URI"):
        prune(workspace.store.uri, True, NOW)
    assert all(stands(artifact) for artifact in kept.values())
