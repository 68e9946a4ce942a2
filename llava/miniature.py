"""A small random copy of a language model that keeps what makes its kind: every kind of layer, every setting.

What a model computes is measured on it within seconds, also where the model itself has 13 billion weights.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llava import pretrained

VOCABULARY = 256
LAYERS_AT_MOST = 16
PARAMETERS_AT_MOST = 200_000_000

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "attention_hidden_size")
_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "decoder_ffn_dim",
    "dense_intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "expert_ffn_hidden_size",
)
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts", "moe_topk")
_TOKENS = ("vocab_size", "vocab_size_per_layer_input")
_PERIODS = ("interval", "period", "pattern", "offset", "freq", "replace", "every", "step")
"""Parts of the names of settings that say which layers are of another kind."""

Change = dict[str, Any]


def miniatures(config: PretrainedConfig, failed: list[str] | None = None) -> Iterator[PreTrainedModel]:
    """Small causal language models with the settings of `config` and random weights in fp32; the smallest first.

    A model whose widths hang together in a way that is not known comes with its own widths and few layers, where
    that has less than 200 million weights. Nothing is given where none can be made; `failed` gets the reasons, a
    line each.
    """
    for narrow in (True, False):
        try:
            small = _smaller(config, narrow)
            with torch.device("meta"):
                size = sum(
                    p.numel() for p in pretrained.random_language_model(copy.deepcopy(small)).parameters()
                )
            if size > PARAMETERS_AT_MOST:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: PreTrainedModel = pretrained.random_language_model(small).eval()
                randomise(model)
        except Exception as error:  # Widths that do not go together fail in a hundred ways.
            if failed is not None:
                failed.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        yield model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the model changes its result; also biases, which begin as zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
        elif name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _smaller(config: PretrainedConfig, narrow: bool) -> PretrainedConfig:
    found = config.to_dict()
    before, layers = _first(found, _LAYERS), _layers(found)
    changes: Change = {}
    for name, value in found.items():
        if name in _TOKENS and isinstance(value, int):
            changes[name] = min(value, VOCABULARY)
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            changes[name] = value % VOCABULARY
        elif name in _LAYERS:
            changes[name] = layers
        elif isinstance(value, list) and before is not None and len(value) == before:
            changes[name] = value[:layers]
        elif name == "per_layer_config" and isinstance(value, dict):
            changes[name] = {layer: kept for layer, kept in value.items() if int(layer) < layers}
        elif name == "max_window_layers" and isinstance(value, int):
            changes[name] = min(value, layers - 1) if before is None or value < before else layers
        elif name in _EXPERTS and isinstance(value, int):
            changes[name] = min(value, 8)
        elif name in _CHOSEN and isinstance(value, int):
            changes[name] = min(value, 2)
    if isinstance(groups := found.get("n_group"), int):
        changes["n_group"] = min(groups, 2)
    if isinstance(found.get("topk_group"), int):
        changes["topk_group"] = 1
    # The jitter of routers is chance; dropout ends with evaluation mode.
    changes |= {name: 0.0 for name, value in found.items() if "jitter" in name and isinstance(value, float)}
    if narrow:
        changes |= _narrow(found)
    return type(config).from_dict({**found, **changes, "quantization_config": None, "dtype": "float32"})


def _narrow(found: dict[str, Any]) -> Change:
    """Fewer heads of the same size; widths that follow."""
    changes: Change = {}
    heads, groups, hidden = _first(found, _HEADS), _first(found, _GROUPS), _first(found, _HIDDEN)
    if heads and hidden:
        size = found.get("head_dim") or max(1, hidden // heads)
        kept = min(groups or heads, 2)
        fewer = kept * min(2, max(1, heads // (groups or heads)))
        for name in _HEADS:
            if isinstance(found.get(name), int):
                changes[name] = fewer
        for name in _GROUPS:
            if isinstance(found.get(name), int):
                changes[name] = kept
        for name in _HIDDEN:
            if isinstance(found.get(name), int):
                changes[name] = fewer * size
        if isinstance(head := found.get("mamba_d_head"), int):
            changes["mamba_n_heads"] = found.get("mamba_expand", 2) * fewer * size // head
    if found.get("word_embed_proj_dim") == hidden and hidden is not None:
        changes["word_embed_proj_dim"] = changes.get("hidden_size", hidden)
    for name in _WIDTHS:
        if isinstance(value := found.get(name), int):
            changes[name] = min(value, 128)
    return changes


def _layers(found: dict[str, Any]) -> int:
    """So many that each kind of layer is among them."""
    count = _first(found, _LAYERS) or 2
    needed = 2
    for name, value in found.items():
        if (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(v, str | int | bool) for v in value)
        ):
            needed = max(needed, 1 + max(value.index(kind) for kind in set(value)))
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and 0 < value < LAYERS_AT_MOST
            and any(part in name for part in _PERIODS)
        ):
            needed = max(needed, value + 1)
    return min(count, needed, LAYERS_AT_MOST)


def _first(found: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        if isinstance(value := found.get(name), int) and not isinstance(value, bool):
            return value
    return None
