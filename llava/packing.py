"""Packed rows through the stock language model: several samples in one row, none of which sees another.

Where a language model hands keywords on to its attention, that attention is told where samples end
(`llava.attention`). One that does not gets a mask over the whole row, which costs the square of its length.
"""

from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING

from llava.attention import Segments, packing_attention
from llava.errors import RefusedInput

MASKED = frozenset(
    {
        "axk2",
        "deepseek_v32",
        "doge",
        "dots3_note_text",
        "falcon",
        "flint",
        "gpt_neo",
        "glm_moe_dsa",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "hy_v4",
        "mpt",
        "nemotron",
        "stablelm",
        "xglm",
    }
)
"""Types that do not hand keywords on to their attention, or compute with the mask itself; found by `llava.faithful`."""


def set_packing(text: Any, attention: str = "auto") -> None:
    """Prepare a stock text model for packed rows; `attention` is a key of `llava.attention.PACKING`."""
    name = packing_attention(attention)
    if text.config.model_type not in MASKED:
        text.set_attn_implementation(name)
        if text.config._attn_implementation != name:
            raise RefusedInput("its attention cannot be told where a packed sample ends")


def stock_attention_of(config: Any) -> str:
    """The attention that a stock text model of this config generates with: SDPA, where its type has it."""
    kind: Any = MODEL_MAPPING.get(type(config), None)
    return "sdpa" if kind is None or kind._supports_sdpa else "eager"


def packed_hidden_states(
    text: Any, embeds_TD: torch.Tensor, position_ids_T: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """(T, D) -> (T, D): the last hidden states of a row, each sample as if it were alone."""
    options: dict[str, Any] = {"segments": segments}
    if text.config.model_type in MASKED:
        options = {"attention_mask": block_mask(segments, embeds_TD)}
    hidden: torch.Tensor = text(
        inputs_embeds=embeds_TD.unsqueeze(0),
        position_ids=position_ids_T.unsqueeze(0),
        use_cache=False,
        **options,
    ).last_hidden_state[0]
    return hidden


def block_mask(segments: Segments, like: torch.Tensor) -> torch.Tensor:
    """(1, 1, T, T), added to scores: 0 where a token looks back inside its own sample, the least number elsewhere."""
    lengths = torch.tensor(segments.lengths, device=like.device)
    number_T = torch.repeat_interleave(torch.arange(len(lengths), device=like.device), lengths)
    seen_TT = (number_T.unsqueeze(0) == number_T.unsqueeze(1)).tril()
    mask_TT = torch.zeros(seen_TT.shape, dtype=like.dtype, device=like.device)
    return mask_TT.masked_fill_(~seen_TT, torch.finfo(like.dtype).min)[None, None]


def layers_of(text: Any) -> nn.ModuleList:
    """The decoder layers of a stock text model, wherever its type keeps them. Raises `RefusedInput`."""
    lists = [module for module in text.modules() if isinstance(module, nn.ModuleList)]
    size = [sum(p.numel() for p in found.parameters()) for found in lists]
    if not lists:
        raise RefusedInput(f"language model of type {text.config.model_type!r}: it has no list of layers")
    return lists[size.index(max(size))]


def ties(language: Any) -> bool:
    """Whether a stock LLaVA around a causal language model has one matrix for embedding and head, as itself may have.

    A stock LLaVA looks for the embedding under one name; where the type has another, the head becomes a copy.
    """
    return bool(getattr(language.config, "tie_word_embeddings", False)) and hasattr(
        language.base_model, "embed_tokens"
    )
