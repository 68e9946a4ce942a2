"""What comes from data, MLflow or another's artifact stays a name: it is no path, no command and no address to call."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.contract import FileEntry, Manifest, open_store
from components.registry import MODEL_DIGEST, MODEL_URI, Registry, Version, artifact_named
from components.scoring.outcomes import FilesNote, files_of
from llava.errors import RefusedInput
from workflows import summary as summaries
from workflows.train import Summary

HEX = "0123456789abcdef" * 4
QUESTION = 'What is it?"; touch owned; echo "$(touch owned)'


def test_the_command_that_is_offered_runs_nothing_of_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summaries, "_example", lambda _: ("photo $(touch owned).png", QUESTION))
    made = Summary(
        artifacts={"finetune": f"{tmp_path}/a b/finetune/0"}, reused=[], seconds={"finetune": 1.0}, scores={}
    )
    workspace: Any = SimpleNamespace(tracking=SimpleNamespace(uri=f"sqlite:///{tmp_path}/a b/mlflow.db"))
    summaries.show(made, workspace)
    lines = capsys.readouterr().err.splitlines()
    (asked,) = [line for line in lines if line.startswith("ask it:")]
    words = shlex.split(asked.removeprefix("ask it:"))
    assert words[-4:] == [f"{tmp_path}/a b/finetune/0", "--image", "photo $(touch owned).png", QUESTION]
    (looked,) = [line for line in lines if line.startswith("look at it:")]
    assert shlex.split(looked)[-1] == f"sqlite:///{tmp_path}/a b/mlflow.db"


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "", "a/b"])
@pytest.mark.parametrize("field", ["answers", "questions", "splits", "labels", "reviews"])
def test_an_evaluation_names_no_file_outside_itself(tmp_path: Path, field: str, name: str) -> None:
    note: dict[str, Any] = {
        "answers": "answers.jsonl",
        "questions": None,
        "labels": {},
        "splits": None,
        "split": "",
        "reviews": [],
        "max_failed": 0.0,
    }
    note[field] = {"labels": {"random": name}, "reviews": [name]}.get(field, name)
    with pytest.raises(RefusedInput, match="which must lie in it"):
        files_of(FilesNote(**note), tmp_path)


@pytest.mark.parametrize("version", ["../1", "1/../../2", "", "1 or 1=1", "²", "1" * 20])
def test_a_version_that_is_no_number_is_none_and_nobody_is_asked(version: str) -> None:
    assert Registry("http://127.0.0.1:9").by_version("name", version) is None


def test_a_champion_is_the_artifact_that_its_digest_says(tmp_path: Path) -> None:
    address = open_store(tmp_path).sub(f"finetune/{HEX[:16]}")
    address.write("model/config.json", b"{}")
    entry = FileEntry(path="model/config.json", size=2, sha256=address.sha256("model/config.json"))
    manifest = Manifest(component="finetune", version="1", digest=HEX, recipe={}, files=[entry], code="x")
    address.write("manifest.json", manifest.to_bytes())

    def named(digest: str) -> Any:
        tags = {MODEL_URI: address.uri, MODEL_DIGEST: digest}
        return artifact_named(Version("n", "1", "", tags), MODEL_URI, MODEL_DIGEST)

    assert named(HEX) is not None and named("f" * 64) is None
