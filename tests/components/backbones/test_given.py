"""Starting stage 2 from a LLaVA that exists: a stock folder that transformers alone wrote, anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from components.backbones.given import Given, start_from
from components.contract import Tracking, Workspace, open_store
from components.contract.runner import Outcome
from components.finetune import Finetune, FinetuneSettings
from llava.errors import RefusedInput
from llava.model import template_of
from tests.components.conftest import Lines, Run
from tests.support.tiny_llava import byte_tokenizer
from workflows import config as configs
from workflows import plan as plans
from workflows import train as workflow


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What others publish: nothing in it tells the template."""
    folder = tmp_path_factory.mktemp("released") / "llava"
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True)]})
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_attention_heads=2, image_size=64, patch_size=16),
        text_config=LlamaConfig(**small, num_attention_heads=2, vocab_size=320),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    edge = {"height": 64, "width": 64}
    LlavaProcessor(
        CLIPImageProcessorPil(size=edge, do_center_crop=False),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def start(mlflow_db: str, tmp_path: Path, lines: Lines) -> Callable[..., Outcome]:
    """`start(uri, template)` in a fresh root, without Ray."""

    def run(uri: str | Path, template: str | None = None) -> Outcome:
        tracking = Tracking(mlflow_db, "given", str(tmp_path / "mlflow"))
        return start_from(
            str(uri), template, Workspace(open_store(tmp_path / "root"), tracking, console=lines)
        )

    return run


def test_a_released_folder_is_mirrored_as_it_is_and_found_again(
    start: Callable[..., Outcome], released: Path
) -> None:
    outcome = start(released, "chatml")
    folder = outcome.artifact.local("model")
    assert template_of(folder) == "chatml"
    for path in released.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert start(released, "chatml").reused
    assert start(outcome.artifact.uri).artifact.digest == outcome.artifact.digest
    assert start(folder).artifact.digest == outcome.artifact.digest


def test_a_folder_on_s3_does_as_well(start: Callable[..., Outcome], released: Path, s3_root: str) -> None:
    store = open_store(s3_root)
    for path in released.iterdir():
        store.upload(path, path.name)
    folder = start(s3_root, "v1").artifact.local("model")
    assert template_of(folder) == "v1"
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (released / weights).read_bytes()


def test_the_template_must_be_named_where_the_folder_does_not_tell(
    start: Callable[..., Outcome], released: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedInput, match=r"has no llava\.json.*finetune\.template"):
        start(released)
    own = copied(released, tmp_path / "own")
    (own / "llava.json").write_text('{"template": "v0"}')
    assert template_of(start(own).artifact.local("model")) == "v0"
    assert start(own, "chatml").reused


def copied(folder: Path, goal: Path) -> Path:
    goal.mkdir()
    for path in folder.iterdir():
        (goal / path.name).write_bytes(path.read_bytes())
    return goal


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def without_projector(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "linear_2" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), r"no \*\.safetensors"),
        (edit("config.json", model_type="llava_next"), "a model of type 'llava_next'"),
        (edit("config.json", image_token_index=7), "image token is 259, the config's 7"),
        (edit("config.json", image_seq_length=17), "image_seq_length is 17, the tower gives 16"),
        (without_projector, "2 weights are missing, such as .*linear_2"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no processor that can be loaded|image token"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_at_once(
    start: Callable[..., Outcome],
    released: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = copied(released, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(RefusedInput, match=message):
        start(folder, "chatml")


def test_the_workflow_skips_backbones_and_pretrain(
    released: Path, tmp_path: Path, ray_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    overrides = [f"finetune.from={released}", "finetune.template=chatml", "shard.scenes=40"]
    config = configs.load("tiny", overrides)
    assert configs.flat(config)["finetune.from"] == str(released)
    workspace = workflow.open_workspace("given", str(tmp_path / "root"))
    steps = plans.make_plan(config)
    assert [step.name for step in steps] == [
        "backbones",
        "shard",
        "instruct",
        "finetune",
        "evaluate",
        "register",
    ]
    plans.preflight(steps, workspace)
    with workflow.running(config, workspace, "train") as run:
        run.make(steps[:1])
    assert run.made["backbones"].manifest.version == Given.version
    assert not workflow.run(config, workspace, until="shard").reused
    with pytest.raises(RefusedInput, match=r"finetune\.from=.* replaces it: run finetune or train"):
        workflow.run(config, workspace, until="pretrain")
    other = configs.load("tiny", [f"finetune.from={tmp_path}/nothing", "shard.scenes=40"])
    with pytest.raises(RefusedInput, match=r"no config\.json"):
        workflow.run(other, workspace)


def test_stage_2_trains_a_released_model(
    run_in: Run, start: Callable[..., Outcome], released: Path, dataset: Outcome
) -> None:
    settings = FinetuneSettings(
        template="chatml", precision="fp32", zero_stage=0, global_batch=8, learning_rate=1e-3, max_length=512
    )
    inputs = {"model": start(released, "chatml").artifact, "dataset": dataset.artifact}
    trained = run_in(Finetune(), settings, inputs).artifact
    before = LlavaForConditionalGeneration.from_pretrained(released)
    after = LlavaForConditionalGeneration.from_pretrained(trained.local("model"))
    changed = {
        name
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert any("language_model" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


@pytest.fixture
def dataset(run_in: Run) -> Outcome:
    """A few scenes with conversations."""
    from components.instruct import Instruct, InstructSettings
    from components.shard import Shard, ShardSettings

    scenes = run_in(Shard(), ShardSettings(scenes=40)).artifact
    return run_in(Instruct(), InstructSettings(), {"dataset": scenes})
