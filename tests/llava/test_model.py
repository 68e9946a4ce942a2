"""Any tower, any language model, either projector: what training computes is what stock transformers computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.model_zoo import packed_loss, stock_loss
from llava import model as models
from llava.errors import RefusedInput
from llava.model import Reading
from tests.support.tiny_llava import byte_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
EDGE = {"height": 64, "width": 64}

TOWERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "clip": lambda: (
        CLIPVisionModel(CLIPVisionConfig(**SMALL, num_attention_heads=2, image_size=64, patch_size=16)),
        CLIPImageProcessorPil(size=EDGE, do_center_crop=False),
    ),
    "siglip": lambda: (
        SiglipVisionModel(SiglipVisionConfig(**SMALL, num_attention_heads=2, image_size=64, patch_size=16)),
        SiglipImageProcessorPil(size=EDGE),
    ),
}
LANGUAGE: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def language_model(kind: str, vocabulary: int, **more: Any) -> PreTrainedModel:
    config, model, options = LANGUAGE[kind]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {**SMALL, **heads, **options, **more, "vocab_size": vocabulary, "initializer_range": 0.3}
    return model(config(**settings, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()


def made(
    tower: str = "clip",
    language: str = "llama",
    reading: Reading | None = None,
    more_language: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[LlavaForConditionalGeneration, Any]:
    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    vision, pictures = TOWERS[tower]()
    text = language_model(language, len(tokenizer), **(more_language or {}))
    return models.join(vision, text, tokenizer, pictures, "chatml", 3, reading, **more)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", LANGUAGE)
def test_training_computes_what_the_stock_folder_computes(tower: str, language: str, tmp_path: Path) -> None:
    model, processor = made(tower, language)
    models.save(model, processor, tmp_path, "chatml")
    assert stock_loss(tmp_path) == pytest.approx(packed_loss(model, processor), rel=1e-5)


@pytest.mark.parametrize(
    ("tower", "keep_cls", "tokens"), [("clip", False, 16), ("clip", True, 17), ("siglip", False, 16)]
)
def test_the_stock_processor_writes_as_many_slots_as_the_tower_gives_features(
    tower: str, keep_cls: bool, tokens: int
) -> None:
    model, processor = made(tower, reading=Reading(keep_cls=keep_cls))
    picture = Image.new("RGB", (70, 30), "red")
    inputs = processor(images=picture, text="<image>\nHello", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == tokens
    assert model.config.image_seq_length == tokens
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [len(each) for each in features] == [tokens]


@pytest.mark.parametrize("layer", [-1, -3, 1])
def test_the_layer_that_is_read_is_config(layer: int, tmp_path: Path) -> None:
    model, processor = made(reading=Reading(feature_layer=layer))
    models.save(model, processor, tmp_path, "chatml")
    assert stock_loss(tmp_path) == pytest.approx(packed_loss(model, processor), rel=1e-5)
    other, _ = made(reading=Reading(feature_layer=-2))
    assert packed_loss(other, processor) != pytest.approx(packed_loss(model, processor), rel=1e-5)


def test_a_linear_projector_is_stored_as_the_stock_one_and_stays_linear(tmp_path: Path) -> None:
    model, processor = made(reading=Reading(projector="linear"))
    names = models.set_trainable(model, ["projector"])
    assert names == [f"model.multi_modal_projector.linear_1.{part}" for part in ("bias", "weight")]
    whole = models.set_trainable(model, ["projector", "language_model"])
    assert not any("linear_2" in name for name in whole)
    projector = model.model.multi_modal_projector
    x = torch.randn(5, 32)
    assert torch.equal(projector(x), projector.linear_1(x))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    projector(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(projector(x), projector.linear_1(x))
    models.save(model, processor, tmp_path, "chatml")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert stock.config.projector_hidden_act == "linear"
    assert torch.equal(stock.model.multi_modal_projector(x), projector.linear_1(x))


def test_the_parts_are_taken_over_and_not_copied() -> None:
    tokenizer = byte_tokenizer()
    vision, pictures = TOWERS["clip"]()
    language = language_model("llama", len(tokenizer) + 1)
    weights = [*vision.parameters(), *language.parameters()]
    model, _ = models.join(vision, language, tokenizer, pictures, "chatml", 3)
    kept = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in kept for weight in weights)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_the_vocabulary_is_padded_to_a_multiple() -> None:
    model, processor = made(pad_to=64)
    vocabulary = model.config.text_config.vocab_size
    assert vocabulary % 64 == 0
    assert 0 <= vocabulary - len(processor.tokenizer) < 64
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().weight.shape[0] == vocabulary


def test_the_seed_alone_decides_the_projector() -> None:
    first, second = (made()[0].model.multi_modal_projector.linear_1.weight for _ in range(2))
    assert torch.equal(first, second)
    assert float(first.detach().std()) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("tower", "reading", "message"),
    [
        ("siglip", Reading(keep_cls=True), "keep_cls: .*siglip.* has no CLS"),
        ("clip", Reading(feature_layer=-5), "feature_layer -5: the vision tower has 3 layers"),
        ("clip", Reading(feature_layer=4), "feature_layer 4"),
        ("clip", Reading(feature_layer=0), "feature_layer 0: stock transformers cannot read"),
    ],
)
def test_what_cannot_be_read_is_refused(tower: str, reading: Reading, message: str) -> None:
    with pytest.raises(RefusedInput, match=message):
        made(tower, reading=reading)


def test_a_language_model_that_would_be_another_one_inside_a_stock_llava_is_refused() -> None:
    tokenizer = byte_tokenizer()
    vision, pictures = TOWERS["clip"]()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    capped = Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **heads, vocab_size=len(tokenizer), final_logit_softcapping=2.0)
    )
    with pytest.raises(RefusedInput, match=r"'gemma2'.*logits differ"):
        models.join(vision, capped, tokenizer, pictures, "chatml", 3)


def test_attention_that_packing_would_change_is_refused() -> None:
    config = made("clip", "mistral")[0].config
    models.check_packing(config, 4096)
    config.text_config.sliding_window = 1024
    models.check_packing(config, 1024)
    with pytest.raises(RefusedInput, match="set max_length to 1024 or less"):
        models.check_packing(config, 2048)
    qwen = made("clip", "qwen2")[0].config
    qwen.text_config.sliding_window = 8
    models.check_packing(qwen, 2048)
