"""Registration in a real MLflow: one version per model, champions by the gate on the same exam, honest refusals."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from pydantic import Field

from components.contract import (
    Artifact,
    Component,
    Job,
    Manifest,
    Settings,
    Tracking,
    Workspace,
    open_store,
    run_component,
)
from components.register import Register, RegisterSettings, champion_model, dataset_digest
from components.registry import Registry, model_folder, open_model, resolve
from components.scoring.benchmarks import Files
from components.scoring.outcomes import comparable, files_note
from llava.data.jsonl import to_jsonl
from llava.errors import LlavaError, RefusedInput
from workflows.promote import promote, rollback


class FileSettings(Settings):
    text: str = Field(description="What the weights are")


class Model(Component):
    """Stands where `finetune` stands: an artifact with a `model/` folder."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = FileSettings

    def run(self, job: Job) -> None:
        job.folder.write("model/config.json", b"{}")
        job.folder.write("model/model.safetensors", job.settings.text.encode())


N = 200
"""Questions of an exam; half a percent each."""


class ScoreSettings(Settings):
    score: float = Field(description="Percent of the questions that are answered rightly")
    exam: str = Field("exam", description="Which questions")
    yes: float | None = Field(None, description="Percent of another benchmark; null: not asked")


class Scored(Component):
    """Stands where `evaluate` stands: answers to an exam, as that stores them."""

    name: ClassVar[str] = "evaluate"
    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = ScoreSettings

    def run(self, job: Job) -> None:
        settings: ScoreSettings = job.settings
        job.notes["exams"] = {}
        for name, folder, score in (("vqa", "", settings.score), ("second", "exams/second", settings.yes)):
            if score is None:
                continue
            rows = [
                {"id": f"{settings.exam}-{number}", "question": "?", "expected": "yes",
                 "answers": {"right_image": "yes" if number < round(N * score / 100) else "no"}}
                for number in range(N)
            ]  # fmt: skip
            job.folder.write(f"{folder}/answers.jsonl".lstrip("/"), to_jsonl(rows))
            job.metrics[f"eval/{name}/exact_match"] = score
            job.notes["exams"][name] = {
                "benchmark": "vqa", "digest": settings.exam, "folder": folder, "scores": {"exact_match": score},
                "files": files_note(Files(answers=Path("answers.jsonl"))),
            }  # fmt: skip


class Bench:
    """A root and a registry, and short cuts to put models through them."""

    def __init__(self, root: str, uri: str, files: str | None = None) -> None:
        self.workspace = Workspace(open_store(root), Tracking(uri, "register", files))
        self.registry = Registry(uri)

    def model(self, text: str) -> Artifact:
        return run_component(Model(), FileSettings(text=text), {}, self.workspace).artifact

    def evaluation(
        self, model: Artifact, score: float, exam: str = "exam", yes: float | None = None
    ) -> Artifact:
        settings = ScoreSettings(score=score, exam=exam, yes=yes)
        return run_component(Scored(), settings, {"model": model}, self.workspace).artifact

    def register(self, name: str, model: Artifact, evaluation: Artifact, **settings: Any) -> Artifact:
        champion = settings.pop("champion", None)
        inputs = {"model": model, "evaluation": evaluation}
        inputs |= {"champion_evaluation": champion} if champion else {}
        wanted = RegisterSettings(name=name, **settings)
        return run_component(Register(), wanted, inputs, self.workspace).artifact

    def enter(
        self,
        name: str,
        text: str,
        score: float,
        exam: str = "exam",
        yes: float | None = None,
        **settings: Any,
    ) -> Artifact:
        model = self.model(text)
        return self.register(name, model, self.evaluation(model, score, exam, yes), **settings)

    def aliases(self, name: str) -> dict[str, str]:
        found = {alias: self.registry.by_alias(name, alias) for alias in ("champion", "challenger")}
        return {alias: version.version for alias, version in found.items() if version}

    def told(self, name: str, version: str, artifact: Artifact) -> tuple[str, str]:
        """Decision and reason as the version's tags tell them; the MLflow run must tell the same."""
        found = self.registry.by_version(name, version)
        assert found is not None
        assert artifact.manifest.mlflow_run_id is not None
        run = MlflowClient(self.workspace.tracking.uri).get_run(artifact.manifest.mlflow_run_id)
        for key in ("promoted", "decision"):
            assert run.data.tags[key] == found.tags[key]
        return found.tags["promoted"], found.tags["decision"]


@pytest.fixture
def bench(folder_root: str, mlflow_db: str, tmp_path: Path) -> Bench:
    return Bench(folder_root, mlflow_db, str(tmp_path / "mlflow"))


@pytest.fixture
def name() -> str:
    """A model name that no other test uses: the database is shared."""
    return f"tiny-{uuid4().hex[:8]}"


def test_the_first_model_is_champion_and_its_version_tells_where_it_comes_from(
    bench: Bench, name: str
) -> None:
    artifact = bench.enter(name, "a", 50.0)
    notes = artifact.manifest.notes["model"]
    assert (notes["version"], notes["alias"]) == ("1", "champion")
    version = bench.registry.by_alias(name, "champion")
    model = bench.model("a")
    assert version is not None
    assert version.source == f"{model.uri}/model"
    assert version.tags["artifact_digest"] == model.digest
    assert version.tags["code"] == model.manifest.code
    assert version.tags["score.eval/vqa/exact_match"] == "50.0"
    assert "no champion" in version.tags["decision"]


def test_drill_a_clearly_better_model_takes_over_and_names_its_parent(bench: Bench, name: str) -> None:
    bench.enter(name, "a", 50.0)
    artifact = bench.enter(name, "b", 60.0)
    assert bench.aliases(name) == {"champion": "2"}
    promoted, reason = bench.told(name, "2", artifact)
    assert promoted == "yes"
    assert reason.startswith("against champion version 1: vqa/exact_match 60.00 against 50.00, +10.00 [+")
    assert reason.endswith("at 95 % on 200 questions (20 better, 0 worse): better")
    version = bench.registry.by_alias(name, "champion")
    assert version is not None
    assert version.tags["parent_version"] == "1"
    found = artifact.manifest.metrics
    assert found["gate/vqa/exact_match/gain"] == 10.0
    assert 0 < found["gate/vqa/exact_match/low"] < 10 < found["gate/vqa/exact_match/high"]


@pytest.mark.parametrize(
    ("first", "second", "rule", "reason"),
    [
        ({"score": 60.0}, {"score": 50.0}, {}, r"-10\.00 \[-.*\(0 better, 20 worse\): worse$"),
        ({"score": 50.0}, {"score": 50.5}, {}, r"\+0\.50 \[\+0\.00.*equal within noise$"),
        ({"score": 50.0}, {"score": 53.0}, {"minimum_difference": 3.0}, r"better, but not surely by more than 3$"),
        (
            {"score": 50.0, "yes": 90.0}, {"score": 60.0, "yes": 79.5}, {"floors": {"second/exact_match": 80.0}},
            r"floor undercut: second/exact_match 79\.50 is under its floor 80; vqa/exact_match 60\.00.*better$",
        ),
        ({"score": 50.0}, {"score": 99.0, "exam": "other"}, {},
         r"refused: not comparable: vqa: the two answered other questions, or were judged otherwise \(exam, other\)"),
        ({"score": 50.0}, {"score": 99.0, "yes": 99.0}, {"benchmarks": ["vqa/exact_match", "second/exact_match"]},
         r"refused: not comparable: second: .* did not measure it"),
    ],
    ids=["clearly worse", "equal within noise", "too little", "better, but under a floor elsewhere", "other questions",
         "a benchmark that the champion never sat"],
)  # fmt: skip
def test_drill_who_does_not_surely_beat_the_champion_stays_challenger_and_is_told_why(
    bench: Bench, name: str, first: dict[str, Any], second: dict[str, Any], rule: dict[str, Any], reason: str
) -> None:
    bench.enter(name, "a", **first)
    artifact = bench.enter(name, "b", **second, **rule)
    assert bench.aliases(name) == {"champion": "1", "challenger": "2"}
    promoted, told = bench.told(name, "2", artifact)
    assert promoted == "no"
    assert told.startswith("against champion version 1: ")
    assert re.search(reason, told), told
    assert artifact.manifest.notes["model"]["decision"] == told


def test_a_first_model_under_a_floor_is_no_champion(bench: Bench, name: str) -> None:
    artifact = bench.enter(name, "a", 50.0, floors={"vqa/exact_match": 60.0})
    assert bench.aliases(name) == {"challenger": "1"}
    told = bench.told(name, "1", artifact)
    assert told == ("no", "floor undercut: vqa/exact_match 50.00 is under its floor 60; there is no champion")


def test_the_champion_may_sit_the_new_exam(bench: Bench, name: str) -> None:
    bench.enter(name, "a", 90.0, "old exam")
    first, second = bench.model("a"), bench.model("b")
    again = bench.evaluation(first, 30.0, "new exam")
    artifact = bench.register(name, second, bench.evaluation(second, 40.0, "new exam"), champion=again)
    assert bench.aliases(name) == {"champion": "2"}
    client = MlflowClient(bench.workspace.tracking.uri)
    run_id = artifact.manifest.mlflow_run_id
    page = client.download_artifacts(run_id, "eval/models.md")
    assert "| vqa/exact\\_match | 200 | 40.0 (33.5 to 47.0) | 30.0 (24.0 to 36.5) |" in Path(page).read_text()


def test_the_model_to_beat_stays_the_same_after_registration_so_that_running_again_is_a_no_op(
    bench: Bench, name: str
) -> None:
    def to_beat(model: Artifact) -> Artifact | None:
        return champion_model(RegisterSettings(name=name), bench.workspace, bench.evaluation(model, 60.0))

    first, second = bench.model("a"), bench.model("b")
    assert to_beat(first) is None
    bench.enter(name, "a", 50.0)
    assert to_beat(first) is None
    assert to_beat(second) == first
    bench.enter(name, "b", 60.0)
    assert bench.aliases(name) == {"champion": "2"}
    assert to_beat(second) == first
    first.folder.delete("manifest.json")
    assert to_beat(second) is None


def test_an_evaluation_of_somebody_else_says_nothing_about_the_champion(bench: Bench, name: str) -> None:
    bench.enter(name, "a", 50.0)
    weak, second = bench.model("weak"), bench.model("b")
    bench.register(name, second, bench.evaluation(second, 45.0), champion=bench.evaluation(weak, 1.0))
    assert bench.aliases(name) == {"champion": "1", "challenger": "2"}


def test_registering_twice_gives_one_version(bench: Bench, name: str) -> None:
    first = bench.enter(name, "a", 50.0)
    assert bench.enter(name, "a", 50.0).manifest == first.manifest
    assert bench.registry.by_version(name, "2") is None


def test_a_crash_before_the_manifest_does_not_make_a_second_version(bench: Bench, name: str) -> None:
    bench.enter(name, "a", 50.0)
    second = bench.enter(name, "b", 60.0)
    decision = second.manifest.notes["model"]["decision"]
    second.folder.delete("manifest.json")
    again = bench.enter(name, "b", 60.0)
    assert again.manifest.notes["model"]["version"] == "2"
    assert again.manifest.notes["model"]["decision"] == decision
    assert bench.aliases(name) == {"champion": "2"}
    assert bench.registry.by_version(name, "3") is None


def test_a_new_evaluation_of_a_registered_model_can_make_it_champion(bench: Bench, name: str) -> None:
    bench.enter(name, "a", 50.0)
    bench.enter(name, "b", 99.0, "other exam")
    assert bench.aliases(name) == {"champion": "1", "challenger": "2"}
    bench.enter(name, "b", 60.0)
    assert bench.aliases(name) == {"champion": "2"}
    assert bench.registry.by_version(name, "3") is None


def test_rollback_leads_to_the_champion_that_was_there_whoever_made_it_one(
    bench: Bench, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bench.registry.uri)
    bench.enter(name, "a", 50.0)
    bench.enter(name, "b", 40.0)
    promote(name, "2", str(tmp_path))
    bench.enter(name, "c", 60.0)
    bench.enter(name, "b", 80.0)
    # Version 2 was made while 1 was champion, and promoted from it by hand once; now it has followed 3.
    assert bench.aliases(name) == {"champion": "2"}
    rollback(name, str(tmp_path))
    assert bench.aliases(name) == {"champion": "3"}


def test_registration_is_not_finished_in_another_registry(
    bench: Bench, folder_root: str, tmp_path: Path, name: str
) -> None:
    model = bench.model("a")
    evaluation = bench.evaluation(model, 50.0)
    bench.register(name, model, evaluation)
    elsewhere = Bench(folder_root, f"sqlite:///{tmp_path}/elsewhere.db")
    elsewhere.register(name, model, evaluation)
    assert elsewhere.aliases(name) == {"champion": "1"}


@pytest.mark.parametrize("change", ["tampered", "missing"])
def test_a_model_that_changed_after_training_is_not_registered(bench: Bench, name: str, change: str) -> None:
    model = bench.model("a")
    evaluation = bench.evaluation(model, 50.0)
    if change == "tampered":
        model.folder.write("model/model.safetensors", b"b")
    else:
        model.folder.delete("model/model.safetensors")
    with pytest.raises(RefusedInput, match=r"model/model\.safetensors"):
        bench.register(name, model, evaluation)
    assert bench.aliases(name) == {}


def test_an_evaluation_of_another_model_or_without_the_metric_is_refused(bench: Bench, name: str) -> None:
    model, other = bench.model("a"), bench.model("b")
    with pytest.raises(RefusedInput, match="does not evaluate"):
        bench.register(name, model, bench.evaluation(other, 50.0))
    with pytest.raises(
        RefusedInput, match=r"register\.benchmarks names 'pope/f1', which .* did not measure; it measured vqa"
    ):
        bench.register(name, model, bench.evaluation(model, 50.0), benchmarks=["pope/f1"])
    with pytest.raises(RefusedInput, match=r"register\.floors names 'vqa/loss'"):
        bench.register(name, model, bench.evaluation(model, 50.0), floors={"vqa/loss": 1.0})


def test_every_way_to_name_a_model_leads_to_its_folder(
    bench: Bench, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.enter(name, "a", 50.0)
    model, tracking = bench.model("a"), bench.workspace.tracking
    want = f"{model.uri}/model"
    for uri in (f"models:/{name}@champion", f"models:/{name}/1", model.uri, want):
        assert resolve(uri, tracking) == want
        assert (open_model(uri, tracking) / "model.safetensors").read_text() == "a"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    assert model_folder(f"models:/{name}@champion", str(tmp_path)) == Path(want)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RefusedInput, match="no MLflow database"):
        model_folder(f"models:/{name}@champion", str(tmp_path))
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "config.json").write_text("{}")
    assert open_model(str(loose)) == loose
    for wrong in (
        f"models:/{name}@nobody",
        f"models:/{name}/7",
        "models:/nothing@champion",
        "models:x",
        str(tmp_path),
    ):
        with pytest.raises(RefusedInput, match=wrong.split("@")[0]):
            resolve(wrong, tracking)


def test_a_server_takes_models_from_s3_and_gives_them_back_verified(
    s3_root: str, mlflow_uri: str, name: str
) -> None:
    bench = Bench(s3_root, mlflow_uri)
    artifact = bench.enter(name, "a", 50.0)
    uri = f"models:/{name}@champion"
    source = resolve(uri, bench.workspace.tracking)
    assert source == artifact.manifest.notes["model"]["source"]
    assert source.startswith(s3_root)
    assert (open_model(uri, bench.workspace.tracking) / "model.safetensors").read_text() == "a"
    bench.enter(name, "b", 60.0)
    assert bench.aliases(name) == {"champion": "2"}


def test_a_server_that_refuses_the_source_fails_in_one_line(
    folder_root: str, mlflow_uri: str, s3_env: object, name: str
) -> None:
    bench = Bench(folder_root, mlflow_uri)
    with pytest.raises(LlavaError, match="Invalid model version source"):
        bench.enter(name, "a", 50.0)


def test_a_champion_whose_answers_are_gone_is_not_comparable(bench: Bench, name: str) -> None:
    bench.evaluation(bench.enter(name, "a", 50.0) and bench.model("a"), 50.0).folder.delete("manifest.json")
    artifact = bench.enter(name, "b", 99.0)
    promoted, reason = bench.told(name, "2", artifact)
    assert (promoted, "its answers are gone" in reason) == ("no", True)


def test_questions_that_either_model_was_trained_on_are_left_out_of_both(bench: Bench) -> None:
    first, second = bench.evaluation(bench.model("a"), 50.0), bench.evaluation(bench.model("b"), 60.0)
    # Of the second's 20 gains, 12 are on pictures that it was trained on.
    seen = [f"exam-{number}" for number in range(100, 112)]
    second.folder.write("contamination.json", json.dumps({"questions": {"vqa": seen}}).encode())
    second.manifest.notes["exams"]["vqa"]["excluded"] = True
    base, new = comparable(first, second, ["vqa"])
    assert (base["vqa"].n, new["vqa"].n) == (188, 188)
    assert (sum(base["vqa"].values), sum(new["vqa"].values)) == (100, 108)


def test_two_retrainings_that_differ_in_their_drops_have_other_digests() -> None:
    first = Manifest(
        component="finetune", version="2", digest="0" * 64, recipe={"extra": [{"weight": 1.0}]}, files=[], code="",
        inputs={"dataset": "a" * 64}, external={"extra 0": "b" * 64},
    )  # fmt: skip
    other = first.model_copy(update={"external": {"extra 0": "c" * 64}})
    weighed = first.model_copy(update={"recipe": {"extra": [{"weight": 0.2}]}})
    alone = first.model_copy(update={"external": {}, "recipe": {"extra": []}})
    found = [dataset_digest(one) for one in (first, other, weighed, alone)]
    assert len(set(found)) == 4
    assert found[3] == "a" * 64
