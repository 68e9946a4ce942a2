"""A model on its device: as if it had been loaded there, block by block."""

from pathlib import Path

import pytest
import torch

from llava import lora
from llava import model as models
from llava.placing import place
from llava.training.checkpoint import FrozenDigest, frozen_digest
from tests.support.tiny_llava import tiny_llava

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("model"))


def test_a_model_that_is_placed_is_the_one_that_would_have_been_loaded(folder: Path) -> None:
    placed, loaded = models.load(folder, torch.float32), models.load(folder, torch.bfloat16)
    models.set_trainable(placed, ["projector"])
    models.set_trainable(loaded, ["projector"])
    seen = FrozenDigest()
    place(placed, CPU, torch.bfloat16, seen.add)
    theirs = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name, value in [*placed.named_parameters(), *placed.named_buffers()]:
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    assert seen.hexdigest() == frozen_digest(loaded)


def test_rotary_frequencies_stay_exact_beside_adapters_in_bf16(folder: Path) -> None:
    stock = models.load(folder, torch.float32)
    expected = {name: value.clone() for name, value in stock.named_buffers() if "inv_freq" in name}
    models.set_trainable(stock, ["projector", "language_model"])
    lora.inject(stock, lora.Lora(4, 8, 0.0), 0)
    place(stock, CPU, torch.bfloat16, lambda name, value: None)
    found = dict(stock.named_buffers())
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())
    assert {value.dtype for value in stock.parameters()} == {torch.bfloat16}


def test_each_block_is_cut_before_the_next_one_comes(folder: Path) -> None:
    stock = models.load(folder, torch.float32)
    order: list[str] = []
    blocks: list[set[str]] = []

    def cut(block: torch.nn.Module) -> None:
        blocks.append(set(order))
        order.clear()

    place(stock, CPU, torch.float32, lambda name, value: order.append(name), cut)
    assert not order
    assert len(blocks) == 1 + len(stock.model.language_model.layers) + 1
    assert all(name.startswith("model.vision_tower.") for name in blocks[0])
    assert all(f".layers.{number - 1}." in name for number in (1, 2) for name in blocks[number])
    names = [name for block in blocks for name in block]
    assert sorted(names) == sorted(name for name, _ in stock.named_parameters())
