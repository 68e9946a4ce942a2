"""The folder that training ends with: what the whole model in memory would have given, made of pieces."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava import lora
from llava import model as models
from llava.learned import Learned
from llava.training.engine import trainable
from tests.support.mixtures import FUSED
from tests.support.tiny_llava import tiny_llava

ADAPTERS = lora.Lora(rank=4, alpha=8, dropout=0.0)


@torch.no_grad()
def learned_by(stock: Any) -> dict[str, torch.Tensor]:
    """What trains, moved a little, in fp32."""
    generator = torch.Generator().manual_seed(1)
    named = trainable(stock)
    return {
        name: value.float() + 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in named.items()
    }


def expected(
    source: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype, adapters: bool, folder: Path
) -> None:
    """The whole model in fp32, rounded at the end."""
    stock = models.load(source, torch.float32)
    if adapters:
        lora.inject(stock, ADAPTERS, 0)
    own = dict(stock.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    if adapters:
        lora.merge(stock)
    module: torch.nn.Module = stock
    module.to(dtype=dtype)
    models.save(stock, models.load_processor(source), folder, "chatml")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def write(
    source: Path,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    adapters: bool,
    largest: int,
    folder: Path,
) -> Path:
    """What the ranks write, the last file first."""
    learned = Learned(
        source,
        set(weights),
        lambda name, shape: weights[name].view(shape),
        dtype,
        ADAPTERS if adapters else None,
        largest,
    )
    folder.mkdir()
    for file in reversed(learned.files):
        learned.write(file, folder)
    learned.write_rest(folder, "model", "chatml")
    return folder


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [2 << 30, 60_000])
def test_the_pieces_are_the_model(tmp_path: Path, adapters: bool, dtype: torch.dtype, largest: int) -> None:
    source = tiny_llava(tmp_path / "model")
    stock = models.load(source, torch.float32)
    models.set_trainable(stock, ["projector", "language_model"])
    if adapters:
        lora.inject(stock, ADAPTERS, 0)
    weights = learned_by(stock)
    expected(source, weights, dtype, adapters, tmp_path / "whole")
    made = write(source, weights, dtype, adapters, largest, tmp_path / "pieces")
    ours, theirs = tensors(made), tensors(tmp_path / "whole")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for path in sorted((tmp_path / "whole").iterdir()):
        if "safetensors" not in path.name:
            assert (made / path.name).read_text() == path.read_text(), path.name
    found, report = LlavaForConditionalGeneration.from_pretrained(made, output_loading_info=True)
    assert not any(report.values()), report
    assert found.dtype == dtype
    if largest < 1 << 30:
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(theirs)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in theirs.values())


@pytest.mark.parametrize("kind", sorted(FUSED))
@pytest.mark.parametrize("adapters", [False, True])
def test_the_experts_of_a_mixture_are_cut_as_on_the_hub(tmp_path: Path, kind: str, adapters: bool) -> None:
    """transformers holds them in one stack and writes them one by one: a layer is converted as a whole."""
    source = tiny_llava(tmp_path / "model", **FUSED[kind])
    stock = models.load(source, torch.float32)
    models.set_trainable(stock, ["projector", "language_model"])
    if adapters:
        lora.inject(stock, ADAPTERS, 0)
    weights = learned_by(stock)
    expected(source, weights, torch.bfloat16, adapters, tmp_path / "whole")
    made = write(source, weights, torch.bfloat16, adapters, 100_000, tmp_path / "pieces")
    ours, theirs = tensors(made), tensors(tmp_path / "whole")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, report = LlavaForConditionalGeneration.from_pretrained(made, output_loading_info=True)
    assert not any(report.values()), report


def test_an_embedding_that_is_the_head_is_written_once(tmp_path: Path) -> None:
    source = tiny_llava(tmp_path / "model", tie_word_embeddings=True)
    stock = models.load(source, torch.float32)
    assert stock.lm_head.weight is stock.model.language_model.embed_tokens.weight
    models.set_trainable(stock, ["projector", "language_model"])
    weights = learned_by(stock)
    expected(source, weights, torch.float32, False, tmp_path / "whole")
    made = write(source, weights, torch.float32, False, 2 << 30, tmp_path / "pieces")
    ours, theirs = tensors(made), tensors(tmp_path / "whole")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any("lm_head" in name for name in ours)


@pytest.mark.parametrize("named", ["float16", "bfloat16"])
def test_weights_are_not_rounded_to_what_the_config_calls_their_precision(tmp_path: Path, named: str) -> None:
    source = tiny_llava(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": named}))
    assert models.stored_dtype(source) == torch.float32
    made = write(source, {}, torch.float32, False, 2 << 30, tmp_path / "pieces")
    ours, theirs = tensors(made), tensors(source)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
