"""The copy is small and keeps what makes the model's kind."""

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Qwen3NextConfig

from llava.miniature import miniatures

THIRTEEN_B = LlamaConfig(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
)


def test_a_13b_is_measured_on_a_few_million_weights() -> None:
    small = next(miniatures(THIRTEEN_B))
    assert sum(p.numel() for p in small.parameters()) < 5_000_000
    assert small.config.hidden_size // small.config.num_attention_heads == 128
    assert THIRTEEN_B.num_hidden_layers == 40


@pytest.mark.parametrize("config", [Qwen3NextConfig(), Gemma3TextConfig()], ids=["qwen3_next", "gemma3"])
def test_each_kind_of_layer_is_among_them(config: AutoConfig) -> None:
    small = next(miniatures(config))
    assert set(small.config.layer_types) == set(config.layer_types)


def test_biases_and_matrices_are_random_and_the_same_each_time() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, attention_bias=True)
    first, second = (next(miniatures(config)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.layers.0.self_attn.q_proj.bias"].abs().sum() > 0


def test_nothing_comes_of_a_config_of_which_no_model_can_be_made() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.hidden_act = "no such function"
    assert list(miniatures(config)) == []
