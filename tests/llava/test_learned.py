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
    made = tmp_path / "pieces"
    made.mkdir()
    learned = Learned(
        source,
        set(weights),
        lambda name, shape: weights[name].view(shape),
        dtype,
        ADAPTERS if adapters else None,
        largest,
    )
    assert (len(learned.files) > 1) == (largest < 1 << 30)
    for file in reversed(learned.files):
        learned.write(file, made)
    learned.write_rest(made, "model", "chatml")
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
