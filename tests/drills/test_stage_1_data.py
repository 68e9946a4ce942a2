"""Stage 1 on data of its own, as the papers have it: the ecosystem's JSON of captions, and `auto` on a CPU."""

import json
from pathlib import Path

import pytest

from components.contract import open_artifact
from components.tiny_world import scenes
from workflows import config as configs
from workflows import train as workflow


@pytest.mark.drill
def test_stage_1_learns_from_its_own_dataset(
    tmp_path: Path, ray_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    records = []
    for scene in scenes(0, 24, "train"):
        (data / "images" / f"{scene.id}.png").write_bytes(scene.png)
        told = [
            {"from": "human", "value": "Say briefly.\n<image>"},
            {"from": "gpt", "value": scene.captions[0]},
        ]
        records.append({"id": scene.id, "image": f"{scene.id}.png", "conversations": told})
    (data / "captions.json").write_text(json.dumps(records))
    overrides = [
        "shard_captions.source=llava",
        f"shard_captions.path={data}",
        "shard_captions.heldout=0",
        "shard.scenes=40",
        "pretrain.epochs=1",
        "pretrain.global_batch=8",
        "pretrain.workers=1",
        "pretrain.zero_stage=0",
        "pretrain.tokens_per_row=auto",
        "pretrain.checkpointing=auto",
    ]
    workspace = workflow.open_workspace("stage-1", str(tmp_path / "root"))
    summary = workflow.run(configs.load("tiny", overrides), workspace, until="pretrain")
    assert list(summary.artifacts) == ["backbones", "shard", "instruct", "shard_captions", "pretrain"]
    trained = open_artifact(summary.artifacts["pretrain"]).manifest
    assert trained.inputs["dataset"] == open_artifact(summary.artifacts["shard_captions"]).digest
    assert trained.notes["coverage"]["samples"] == len(records)
    assert trained.notes["chosen"] == "auto without a GPU: tokens_per_row=4096, checkpointing=none"
    assert trained.run["tokens_per_row"] == "auto"
