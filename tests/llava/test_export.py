"""A saved model is a folder in the form of the hub's LLaVAs, whichever door the model came through."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from benchmarks.model_zoo import stock_loss
from llava import export, generate
from llava import model as models
from llava.model import Reading
from tests.llava.test_model import TOWERS, made
from tests.support.tiny_llava import byte_tokenizer

ROPE = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip

Door = Callable[[Path, str], tuple[Any, Any]]


def joined(folder: Path, tower: str) -> tuple[Any, Any]:
    return made(tower)


def from_towers_on_disk(folder: Path, tower: str) -> tuple[Any, Any]:
    """As `backbones` has them: each was loaded from a folder of this machine."""
    from components.backbones.sources import load_language, load_vision

    torch.manual_seed(5)
    vision, pictures = TOWERS[tower]()
    tokenizer = byte_tokenizer()
    text = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                        num_attention_heads=4, vocab_size=len(tokenizer)))  # fmt: skip
    for part, name in ((vision, "vision"), (pictures, "vision"), (text, "language"), (tokenizer, "language")):
        part.save_pretrained(folder / name)
    language, tokenizer = load_language(folder / "language", "language")
    vision, pictures = load_vision(folder / "vision", "vision")
    return models.join(vision, language, tokenizer, pictures, "chatml", 3)


def loaded(folder: Path, tower: str) -> tuple[Any, Any]:
    """As `finetune` has what `backbones` wrote."""
    models.save(*made(tower), folder / "before", "chatml")
    return again(folder / "before")


def as_stock_writes(folder: Path, tower: str) -> tuple[Any, Any]:
    """As earlier versions of this package wrote, and transformers alone does."""
    model, processor = made(tower)
    model.save_pretrained(folder / "stock")
    processor.save_pretrained(folder / "stock")
    return again(folder / "stock")


def natively_named(folder: Path, tower: str) -> tuple[Any, Any]:
    model, processor = made(tower)
    model.save_pretrained(folder / "native", save_original_format=False)
    processor.save_pretrained(folder / "native")
    return again(folder / "native")


def again(folder: Path) -> tuple[Any, Any]:
    return models.load(folder, torch.float32), models.load_processor(folder)


def names(folder: Path) -> list[str]:
    found = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            found += weights.keys()
    return sorted(found)


def expected_names(tower: str) -> set[str]:
    """What llava-hf has, but for the numbers of layers."""
    linear = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    norms = ["layer_norm1", "layer_norm2"]
    layer = [f"encoder.layers.N.{name}.{kind}" for name in linear + norms for kind in ("weight", "bias")]
    vision = {f"vision_tower.vision_model.{name}" for name in layer}
    text = {"input_layernorm", "post_attention_layernorm", *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
            *(f"self_attn.{one}_proj" for one in "qkvo")}  # fmt: skip
    return {
        *vision,
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        *(f"language_model.model.layers.N.{one}.weight" for one in text),
        *(f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
        *(["vision_tower.vision_model.pre_layrnorm.weight"] if tower == "clip" else []),
    }


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("door", [joined, from_towers_on_disk, loaded, as_stock_writes, natively_named])
def test_weights_have_the_names_of_llava_hf_from_every_door(door: Door, tower: str, tmp_path: Path) -> None:
    model, processor = door(tmp_path / "door", tower)
    models.save(model, processor, tmp_path / "model", "chatml")
    found = {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in names(tmp_path / "model")}
    assert expected_names(tower) <= found
    assert all(name.startswith(("language_model.", "multi_modal_projector.", "vision_tower.vision_model."))
               for name in found)  # fmt: skip
    assert len(names(tmp_path / "model")) == len(model.state_dict())
    for path in (tmp_path / "model").glob("*.json"):
        assert str(tmp_path) not in path.read_text() and "name_or_path" not in path.read_text(), path


def test_a_model_in_several_files_has_them_too_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = made()
    models.save(model, processor, tmp_path / "one", "chatml")
    monkeypatch.setattr(export, "_LARGEST", "60KB")
    models.save(model, processor, tmp_path / "some", "chatml")
    assert len(list((tmp_path / "some").glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "some/model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == names(tmp_path / "some") == names(tmp_path / "one")
    for name, file in index.items():
        with safe_open(tmp_path / "some" / file, "pt") as weights:
            assert name in weights.keys()  # noqa: SIM118
    assert stock_loss(tmp_path / "some") == stock_loss(tmp_path / "one")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "some").iterdir()} <= {0o600, 0o644}


def test_what_older_versions_read_is_there_and_says_the_same(tmp_path: Path) -> None:
    model, processor = made(more_language={"rope_parameters": ROPE, "max_position_embeddings": 512})
    models.save(model, processor, tmp_path, "chatml")
    texts = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert texts["config.json"]["text_config"]["rope_theta"] == ROPE["rope_theta"]
    assert texts["config.json"]["text_config"]["rope_scaling"]["factor"] == 8.0
    assert texts["preprocessor_config.json"]["image_processor_type"] == "CLIPImageProcessor"
    assert "image_processor" not in texts["processor_config.json"]
    assert texts["processor_config.json"]["num_additional_image_tokens"] == 1
    assert texts["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert texts["tokenizer_config.json"]["additional_special_tokens"] == ["<image>"]
    back = models.load(tmp_path, torch.float32)
    assert back.config.text_config.rope_parameters == model.config.text_config.rope_parameters
    ids = torch.arange(200).unsqueeze(0) % 100
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_of_an_earlier_version_answers_as_before(tmp_path: Path) -> None:
    """Its names, its one file for the processor and its class of tokenizer are transformers' own."""
    model, processor = made()
    models.save(model, processor, tmp_path / "now", "chatml")
    model.save_pretrained(tmp_path / "before")
    processor.save_pretrained(tmp_path / "before")
    assert any(name.startswith("vision_tower.embeddings") for name in names(tmp_path / "before"))
    pictures = [generate.blank_picture(processor.image_processor)]
    answers = {
        name: generate.answer(*generate.load(tmp_path / name), ["What is it?"], pictures, 8)
        for name in ("now", "before")
    }
    assert answers["now"] == answers["before"]


def test_a_linear_projector_keeps_the_name_that_stock_knows(tmp_path: Path) -> None:
    models.save(*made(reading=Reading("linear")), tmp_path, "chatml")
    assert json.loads((tmp_path / "config.json").read_text())["projector_hidden_act"] == "linear"
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(stock.model.multi_modal_projector.linear_2.weight, torch.eye(32))
