"""Packed rows for types whose attention cannot be told where a sample ends."""

import torch
from transformers import LlamaConfig, LlamaModel, MptConfig, MptModel

from llava.attention import segments
from llava.packing import block_mask, layers_of, stock_attention_of


def test_the_mask_lets_a_token_see_its_own_sample_up_to_itself() -> None:
    mask = block_mask(segments([2, 1]), torch.zeros(1, dtype=torch.float16))
    assert mask.dtype == torch.float16 and mask.shape == (1, 1, 3, 3)
    assert (mask[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_layers_are_found_wherever_they_are() -> None:
    small = MptModel(MptConfig(d_model=16, n_heads=2, n_layers=3, vocab_size=30))
    assert layers_of(small) is small.blocks
    llama = LlamaModel(
        LlamaConfig(hidden_size=16, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2)
    )
    assert layers_of(llama) is llama.layers


def test_a_type_without_sdpa_generates_with_its_own_attention() -> None:
    assert stock_attention_of(MptConfig()) == "eager" and stock_attention_of(LlamaConfig()) == "sdpa"
