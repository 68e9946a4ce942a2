"""A random LLaVA of about a given number of parameters, nearly all of them in the language model."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava.model import join, save
from tests.support.tiny_llava import byte_tokenizer

_HIDDEN = (2048, 1024, 512, 256, 128, 64)
_LAYERS = 8
"""At least: a layer is then a small part of the whole, as in a large model."""


class Made(NamedTuple):
    """A model that was made, in numbers."""

    parameters: int
    trainable: int
    layer: int
    """Parameters of a decoder layer."""
    largest: int
    """Parameters of the largest tensor."""


def make_model(folder: Path, parameters: int, stored: torch.dtype) -> Made:
    """Write a stock folder in the precision `stored`."""
    torch.manual_seed(0)
    hidden, layers = next(
        (size, parameters // _per_layer(size))
        for size in _HIDDEN
        if parameters >= _LAYERS * _per_layer(size) or size == _HIDDEN[-1]
    )
    tokenizer, small = byte_tokenizer(), {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(**small, num_attention_heads=2, image_size=64, patch_size=16))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=_wide(hidden),
        num_hidden_layers=max(1, layers),
        num_attention_heads=max(1, hidden // 64),
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    language: Any = LlamaForCausalLM(config)
    edge = {"height": 64, "width": 64}
    pictures = CLIPImageProcessorPil(size=edge, do_center_crop=False)
    model, processor = join(vision, language.to(stored), tokenizer, pictures, template="chatml", seed=3)
    save(model, processor, folder, "chatml")
    named = {name: value.numel() for name, value in model.named_parameters()}
    tower = sum(count for name, count in named.items() if "vision_tower" in name)
    layer = sum(count for name, count in named.items() if "language_model.layers.0." in name)
    return Made(sum(named.values()), sum(named.values()) - tower, layer, max(named.values()))


def _wide(hidden: int) -> int:
    return hidden * 11 // 4


def _per_layer(hidden: int) -> int:
    return 4 * hidden**2 + 3 * hidden * _wide(hidden)
