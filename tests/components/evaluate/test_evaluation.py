"""Evaluation with a real small model, real Parquet, Ray and MLflow: scores, what is left out, resumption, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from components.contract import Artifact, open_store
from components.evaluate import Evaluate, EvaluateSettings, report
from components.scoring.base import read_rows
from components.scoring.benchmarks import Files, find
from components.scoring.outcomes import outcomes
from llava.errors import RefusedInput
from tests.support.evaluated import QUESTIONS, Given, GivenSettings, Row, dataset


def test_an_evaluation_scores_every_benchmark_from_files_that_anybody_can_score_again(
    run_in: Callable[..., Any],
    inputs: dict[str, Artifact],
    entries: list[dict[str, Any]],
    mlflow_db: str,
    known_rows: list[Row],
) -> None:
    settings = EvaluateSettings(
        max_new_tokens=6, batch_size=8, workers=2, benchmarks=[one | {"max_new_tokens": 8} for one in entries]
    )
    artifact = run_in(Evaluate(), settings, inputs).artifact
    found, folder = artifact.manifest.metrics, artifact.local()
    assert found["eval/n"] == len(known_rows)
    assert found["eval/vqa/even/exact_match"] == 100
    assert found["eval/vqa/odd/exact_match"] == 0
    assert found["eval/vqa/exact_match"] == 50
    assert found["eval/vqa/even/wrong_image"] < 50
    assert found["eval/loss"] > 0
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in known_rows]
    shown = {row["id"]: row["image"]["bytes"] for row in known_rows}
    assert all(shown[line["id"]] != shown[line["wrong_image_of"]] for line in lines)

    notes = artifact.manifest.notes["exams"]
    assert list(notes) == ["vqa", "pope", "scienceqa", "vqa-ten", "own", "captions", "llava-bench"]
    # Without a judge it is answered, with its pictures and with blank ones, and not scored.
    assert notes.pop("llava-bench")["scores"] == {}
    said_ = [
        {
            row["question_id"]: row["text"]
            for row in read_rows(folder / "exams" / "llava-bench" / f"{name}.jsonl")
        }
        for name in ("answers", "blank-answers")
    ]
    assert len(said_[0]) == 6 and said_[0].keys() == said_[1].keys() and said_[0] != said_[1]
    again = outcomes(artifact)
    for name, note in notes.items():
        told = {score: value for score, value in again[name].scores.items() if math.isfinite(value)}
        assert {score: value for score, value in note["scores"].items() if value is not None} == told
        if name != "vqa":
            assert {found[f"eval/{name}/{score}"] for score in told} == set(told.values())
            assert f"eval/{name}/blank_image/{find(note['benchmark']).headline}" in found or not told
    assert (notes["pope"]["n"], notes["vqa-ten"]["n"], notes["captions"]["n"]) == (24, 6, 6)
    # A model of random weights names no option: that is reported, and wrong.
    assert notes["scienceqa"]["failed"] == notes["scienceqa"]["n"] > 0
    pope = folder / "exams" / "pope"
    labels = {split: pope / f"labels-{split}.jsonl" for split in ("random", "adversarial")}
    files = Files(pope / "answers.jsonl", pope / "questions.jsonl", labels)
    assert find("pope").score(files).scores["random/yes_ratio"] == notes["pope"]["scores"]["random/yes_ratio"]

    text = (folder / "report.md").read_text()
    assert "| vqa/exact\\_match | 40 | 50.0 (" in text
    assert "| all | 40 | 50.0 |" in text
    assert "1 of 7 pictures" not in text
    assert re.search(
        r"contamination\\: 1 of 13 pictures are in the training data; their questions \(6 of vqa\) count",
        text,
    )
    sampled = [
        line
        for line in text.splitlines()
        if re.match(r"\| (even|odd|pope|scienceqa|vqa-ten|own|captions|llava-bench) \|", line)
    ]
    assert len(sampled[-report.SAMPLES :]) == 20
    client = MlflowClient(mlflow_db)
    run = client.get_run(artifact.manifest.mlflow_run_id)
    assert run.data.metrics["eval/vqa/exact_match"] == 50
    published = {file.path for file in client.list_artifacts(run.info.run_id, "eval")}
    pages = ("report.md", "samples.png", "benchmarks.png", "by_kind.png", "answers.json", "benchmarks.json")
    assert {f"eval/{name}" for name in pages} <= published


def test_pictures_that_were_trained_on_can_be_left_out(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], known_rows: list[Row]
) -> None:
    settings = EvaluateSettings(max_new_tokens=2, contamination="exclude")
    artifact = run_in(Evaluate(), settings, inputs).artifact
    red = [row["id"] for row in known_rows if row["image"]["path"] == "red.png"]
    told = json.loads(artifact.folder.read("contamination.json"))
    assert told["questions"] == {"vqa": red}
    assert told["looked_through"] == [inputs["questions"].uri]
    assert artifact.manifest.metrics["eval/n"] == QUESTIONS - len(red)
    assert outcomes(artifact)["vqa"].n == artifact.manifest.notes["exams"]["vqa"]["n"] == QUESTIONS - len(red)
    inputs["questions"].folder.delete("manifest.json")
    with pytest.raises(RefusedInput, match=r"exclude: 1 of the artifacts that .* comes from are gone"):
        run_in(Evaluate(), EvaluateSettings(max_new_tokens=3, contamination="exclude"), inputs)


@pytest.mark.drill
def test_a_crash_before_the_commit_gives_the_same_answers_file(
    run_in: Callable[..., Any],
    inputs: dict[str, Artifact],
    lines: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    say = type(lines).say

    def crash(text: str, prefix: str = "") -> None:
        say(lines, text, prefix)
        if "questions answered" in text:
            raise KeyboardInterrupt

    settings = EvaluateSettings(max_new_tokens=5, workers=1, batch_size=16)
    monkeypatch.setattr(lines, "say", crash)
    with pytest.raises(KeyboardInterrupt):
        run_in(Evaluate(), settings, inputs)
    monkeypatch.undo()
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert "16 of 40 questions are answered already" in lines.said
    whole = run_in(Evaluate(), settings, inputs, tmp_path / "elsewhere").artifact
    assert artifact.folder.read("answers.jsonl") == whole.folder.read("answers.jsonl")


def test_a_dataset_without_held_out_rows_is_refused(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    empty = run_in(Given("no_rows", dataset(tmp_path / "empty", [])), GivenSettings()).artifact
    with pytest.raises(RefusedInput, match="no held-out rows"):
        run_in(Evaluate(), EvaluateSettings(), inputs | {"questions": empty})


def test_an_artifact_without_a_model_is_refused(
    run_in: Callable[..., Any], inputs: dict[str, Artifact]
) -> None:
    with pytest.raises(RefusedInput, match=r"holds no model/config\.json"):
        run_in(Evaluate(), EvaluateSettings(), inputs | {"model": inputs["questions"]})


def test_everything_that_evaluate_would_refuse_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    workspace: Any = SimpleNamespace(store=open_store(tmp_path))
    gone = str(tmp_path / "gone")
    pope = {"benchmark": "pope", "questions": gone, "labels": {"random": gone}}
    settings = EvaluateSettings(gpu=True, benchmarks=[pope])
    told = Evaluate().preflight(settings, workspace)
    assert [one.partition(":")[0] for one in told] == [
        "evaluate.benchmarks[0].questions", "evaluate.benchmarks[0].labels.random", "evaluate"
    ]  # fmt: skip
    assert all(gone in one for one in told[:2]) and "this machine has 0" in told[2]
    # A finished evaluation may be the one that is meant: it is found again on a machine without a GPU.
    (tmp_path / "evaluate" / "made").mkdir(parents=True)
    (tmp_path / "evaluate" / "made" / "manifest.json").write_text("{}")
    assert Evaluate().preflight(EvaluateSettings(gpu=True), workspace) == []
