"""The tower's hidden states, computed as far as they are read."""

import pytest
import torch
from torch import nn

from llava.model import hidden_states
from tests.llava.test_model import TOWERS


@pytest.mark.parametrize("family", TOWERS)
def test_they_are_the_stock_towers_bit_for_bit_and_no_layer_more(family: str) -> None:
    torch.manual_seed(0)
    tower = TOWERS[family]()[0].eval()
    pictures = torch.randn(2, 3, tower.config.image_size, tower.config.image_size)
    (layers,) = (part for part in tower.encoder.modules() if isinstance(part, nn.ModuleList))
    ran = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        found = hidden_states(tower, pictures, 2)
        assert ran == [0, 1]
        stock = tower(pictures, output_hidden_states=True).hidden_states
    assert len(found) == 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, stock, strict=False))
