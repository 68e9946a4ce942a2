"""The arithmetic of shapes against the real modules: every parameter, every operation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava import model as models
from llava.attention import segments
from llava.data.collate import PackedRow
from llava.errors import RefusedInput
from llava.model import Reading
from llava.pixels import Pixels
from llava.sizes import (
    CLIP_L14,
    CLIP_L14_336,
    VICUNA_7B,
    VICUNA_13B,
    LanguageSizes,
    Sizes,
    Training,
    VisionSizes,
    Work,
    flops,
    flops_per_token,
    language_sizes,
    llava_sizes,
    vision_sizes,
)
from tests.llava.test_model import LANGUAGE, TOWERS, language_model, made


def vicuna(sizes: LanguageSizes) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
    )


def clip(sizes: VisionSizes) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
    )


@pytest.mark.parametrize(
    ("language", "published"), [(VICUNA_7B, 6_738_415_616), (VICUNA_13B, 13_015_864_320)]
)
@pytest.mark.parametrize(("vision", "projector"), [(CLIP_L14, "linear"), (CLIP_L14_336, "mlp2x_gelu")])
def test_a_llava_on_the_meta_device_has_the_parameters_of_the_arithmetic(
    vision: VisionSizes, projector: Any, language: LanguageSizes, published: int
) -> None:
    act = "linear" if projector == "linear" else "gelu"
    config = LlavaConfig(vision_config=clip(vision), text_config=vicuna(language), projector_hidden_act=act)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    sizes = Sizes(vision, language, projector)
    assert language.parameters == published
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) == vision.parameters
    assert model.num_parameters() == sizes.parameters
    for parts, training in ((["projector"], "frozen"), (["projector", "language_model"], "full")):
        names = models.set_trainable(model, parts)
        learning: Training = training  # type: ignore[assignment]
        assert sum(model.get_parameter(name).numel() for name in names) == sizes.trainable(learning)
    assert llava_sizes(config.to_dict()) == sizes
    assert sizes.image_tokens == {224: 256, 336: 576}[vision.image]


def test_the_published_towers_have_their_published_size() -> None:
    assert CLIP_L14.parameters == pytest.approx(303e6, rel=5e-3)
    assert CLIP_L14_336.parameters == pytest.approx(304e6, rel=5e-3)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", LANGUAGE)
def test_shapes_read_from_a_config_count_every_parameter(tower: str, language: str) -> None:
    model, _ = made(tower, language, Reading(projector="linear"))
    sizes = llava_sizes(model.config.to_dict())
    assert model.num_parameters() == sizes.parameters
    assert sizes.image_tokens == models.image_tokens(model.config)


def test_shapes_of_other_families_are_refused() -> None:
    with pytest.raises(RefusedInput, match="type 'gemma2'"):
        language_sizes({"model_type": "gemma2"})
    with pytest.raises(RefusedInput, match="type 'vit'"):
        vision_sizes({"model_type": "vit"})
    with pytest.raises(RefusedInput, match="names no 'hidden_size'"):
        language_sizes({"model_type": "llama"})


def packed(model: LlavaForConditionalGeneration, lengths: list[int]) -> PackedRow:
    """A row of samples, each with one picture at its start, whose last two tokens are supervised."""
    tokens, vocabulary = models.image_tokens(model.config), model.config.text_config.vocab_size
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    return PackedRow(
        input_ids=torch.arange(sum(lengths)) % (vocabulary - 1),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        segments=segments(lengths),
        image_positions=torch.cat([torch.arange(start, start + tokens) for start in starts]),
        pixels=torch.zeros(len(lengths), 3, 64, 64, dtype=torch.uint8),
        predict=torch.tensor([end - back for end in ends for back in (3, 2)]),
        targets=torch.tensor([5, 6] * len(lengths)),
    )


@pytest.mark.parametrize("language", ["llama", "qwen3"])
@pytest.mark.parametrize("training", ["frozen", "full"])
@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_operations_are_those_that_torch_counts(
    language: str, training: Training, projector: Any, tower: bool
) -> None:
    model, processor = made("clip", language, Reading(projector=projector))
    sizes = llava_sizes(model.config.to_dict())
    parts = ["projector"] + ["language_model"] * (training == "full") + ["vision_tower"] * tower
    models.set_trainable(model, parts)
    module = models.LlavaForTraining(model, Pixels(processor.image_processor))
    lengths = [40, 40]
    with FlopCounterMode(display=False) as counter:
        module(packed(model, lengths)).backward()
    counted = {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts()["Global"].items()}
    matrices = sum(counted.get(op, 0) for op in ("mm", "addmm"))
    conv = counted.get("convolution", 0) + counted.get("convolution_backward", 0)
    ours = flops(sizes, Work.of(lengths, supervised=4, images=2), training, tower=tower)
    vision = sizes.vision
    scores = 2 * (vision.layers - 1) * (12 if tower else 4) * vision.positions**2 * vision.hidden
    identity = 2 * 16 * 32 * 32 * 4 if projector == "linear" else 0
    assert (
        matrices == ours.language + ours.vocabulary + ours.projector + ours.vision - scores - conv + identity
    )
    assert ours.language == flops_per_token(sizes, training) * 80


def test_looking_back_only_halves_the_square() -> None:
    sizes = Sizes(CLIP_L14_336, VICUNA_7B)
    alone = flops(sizes, Work.of([1000], 0, 0), "full").attention
    # Forward 2 matrices, backward 4; 2 operations each; half of 1000 x 1000; 32 layers of 32 x 128.
    assert alone == 6 * 2 * 0.5 * 1000**2 * 32 * 32 * 128
    assert flops(sizes, Work.of([500, 500], 0, 0), "full").attention == alone / 2


def test_lora_counts_its_own_matrices(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    assert peft
    from llava.lora import Lora, inject

    model, _ = made()
    sizes = llava_sizes(model.config.to_dict())
    models.set_trainable(model, ["projector", "language_model"])
    inject(model, Lora(rank=4, alpha=8), seed=0)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert learning == sizes.trainable("lora", rank=4)
    assert learning - sizes.projector_parameters == sizes.language.lora_parameters(4)


def test_a_language_model_alone_is_counted(tmp_path: Path) -> None:
    model = language_model("qwen2", 300)
    assert language_sizes(model.config.to_dict()).parameters == model.num_parameters()


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_learns_as_far_as_it_is_read(tower: str, layer: int) -> None:
    model, processor = made(tower, reading=Reading(feature_layer=layer))
    names = models.set_trainable(model, ["vision_tower"])
    assert sum(model.get_parameter(n).numel() for n in names) == llava_sizes(
        model.config.to_dict()
    ).trainable("frozen", tower=True) - sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    module = models.LlavaForTraining(model, Pixels(processor.image_processor))
    module(packed(model, [40, 40])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(names)
