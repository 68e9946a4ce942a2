"""Starting stage 2 from a LLaVA that exists: a stock folder that transformers alone wrote, anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    AutoProcessor,
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
from llava import model as models
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
    with pytest.raises(RefusedInput, match=r"has no llava\.json, which says the template"):
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


def image_edge(edge: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "processor_config.json"
        found = json.loads(path.read_text())
        found["image_processor"]["size"] = {"height": edge, "width": edge}
        path.write_text(json.dumps(found))

    return change


def take_out(name: str, *keys: str) -> Callable[[Path], None]:
    """As folders of older transformers are: without them."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({key: value for key, value in found.items() if key not in keys})
        )

    return change


def as_before_processors(folder: Path) -> None:
    """What transformers wrote before it had a class for the processor."""
    found = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(found["image_processor"]))
    (folder / "processor_config.json").unlink()


def with_other_images(folder: Path) -> None:
    found = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    other = found | {"size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(other))


def with_one_layer_more(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    more = {
        name.replace("layers.1.", "layers.2."): value.clone()
        for name, value in weights.items()
        if name.startswith("language_model") and "layers.1." in name
    }
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})


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
        (
            edit("config.json", vision_feature_layer=0),
            "vision_feature_layer 0: stock transformers cannot read",
        ),
        (edit("config.json", vision_feature_layer=-9), "vision_feature_layer is -9, the tower has 2 layers"),
        (
            edit("config.json", vision_feature_layer=[-2, 7]),
            r"vision_feature_layer is \[-2, 7\], the tower has 2",
        ),
        (edit("processor_config.json", patch_size=8), r"patch_size is 8 in processor_config\.json and 16"),
        (
            edit("processor_config.json", vision_feature_select_strategy="full"),
            "is 'full' in processor_config",
        ),
        (edit("processor_config.json", num_additional_image_tokens=2), "num_additional_image_tokens is 2"),
        (image_edge(32), "the image processor gives 3 x 32 x 32, the tower takes 3 x 64 x 64"),
        (
            with_other_images,
            r"size is .*64.* in processor_config\.json and .*32.* in preprocessor_config\.json",
        ),
        (edit("generation_config.json", eos_token_id=9999), "eos_token_id is 9999 in .* the model has 320"),
        (
            edit("processor_config.json", processor_class="LlavaNextProcessor"),
            "a LlavaNextProcessor; a LLaVA has",
        ),
        (with_one_layer_more, r"9 weights have no place by config\.json, such as .*layers\.2"),
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


@pytest.mark.parametrize(
    "damage",
    [
        take_out("processor_config.json", "num_additional_image_tokens"),
        edit("processor_config.json", num_additional_image_tokens=0),
        take_out("processor_config.json", "patch_size", "vision_feature_select_strategy"),
        as_before_processors,
        take_out("config.json", "image_seq_length"),
        take_out("tokenizer_config.json", "pad_token"),
    ],
)
def test_what_an_older_folder_leaves_out_is_filled_in_and_the_model_answers(
    start: Callable[..., Outcome], released: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Training reads the folder as it is, and what it writes says everything."""
    folder = copied(released, tmp_path / "older")
    damage(folder)
    mirrored = start(folder, "chatml").artifact.local("model")
    model, processor = models.load(mirrored, torch.float32), models.load_processor(mirrored)
    models.save(model, processor, tmp_path / "trained", "chatml")
    answered = answer("What is it?", tmp_path / "trained")
    models.save(*whole(released), tmp_path / "of the whole folder", "chatml")
    assert answered == answer("What is it?", tmp_path / "of the whole folder")


def whole(folder: Path) -> tuple[Any, Any]:
    return models.load(folder, torch.float32), models.load_processor(folder)


def answer(question: str, folder: Path) -> str:
    """By what unmodified transformers loads."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=text, images=Image.new("RGB", (50, 30), "red"), return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return str(processor.decode(written[0]))


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
