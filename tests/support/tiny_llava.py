"""A real LLaVA of random weights, made in a second: every part is there, nothing is learned."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from llava.model import join, save


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens of chatml."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>")


def tiny_llava(folder: Path, language: type[PreTrainedConfig] = LlamaConfig, **settings: Any) -> Path:
    """A stock LLaVA folder of random weights: 64 px, patches of 16, one token per byte.

    `language`, `settings`: another kind of language model.
    """
    torch.manual_seed(7)
    tokenizer = byte_tokenizer()
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(**small, num_attention_heads=2, image_size=64, patch_size=16))
    usual: dict[str, Any] = {
        **small,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = AutoModelForCausalLM.from_config(language(**{**usual, **settings}))
    edge = {"height": 64, "width": 64}
    pictures = CLIPImageProcessorPil(size=edge, do_center_crop=False)
    model, processor = join(vision, made, tokenizer, pictures, template="chatml", seed=3)
    # Random projector weights of the usual size leave every picture looking the same to random layers.
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    save(model, processor, folder, "chatml")
    return folder
