"""The tower's hidden states, computed as far as they are read."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llava.model import hidden_states


@pytest.mark.parametrize(
    ("config", "kind"), [(CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel)]
)
def test_they_are_the_stock_towers_bit_for_bit_and_no_layer_more(config: Any, kind: Any) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = kind(config(**small, image_size=32, patch_size=8)).eval()
    pictures = torch.randn(2, 3, 32, 32)
    ran = []
    for number, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        found = hidden_states(tower, pictures, 2)
        assert ran == [0, 1]
        stock = tower(pictures, output_hidden_states=True).hidden_states
    assert len(found) == 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, stock, strict=False))
