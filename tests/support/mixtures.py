"""Kinds of language models with fused experts, small: what `tiny_llava` takes."""

from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

FUSED: dict[str, dict[str, Any]] = {
    "mixtral": {"language": MixtralConfig, "num_local_experts": 4},
    "qwen2_moe": {
        "language": Qwen2MoeConfig,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        "language": Qwen3MoeConfig,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
    },
    "deepseek_v3": {
        "language": DeepseekV3Config,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt_oss": {
        "language": GptOssConfig,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    },
    "granitemoe": {"language": GraniteMoeConfig, "num_local_experts": 4},
    "olmoe": {"language": OlmoeConfig, "num_experts": 4, "num_experts_per_tok": 2},
}
"""By `model_type`. `gpt_oss` has experts as (experts, inputs, outputs), the others as (experts, outputs, inputs)."""
