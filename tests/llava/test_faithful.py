"""What packing would change is measured and refused; what it would not is taken."""

from typing import Any

import pytest
from transformers import (
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3NextConfig,
)

from llava import faithful
from llava.errors import RefusedInput

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}


def test_recurrent_layers_are_refused_by_name_and_figure() -> None:
    with pytest.raises(
        RefusedInput, match=r"^language model of type 'qwen3_next': packed .* loss is .*alone"
    ) as told:
        faithful.check_language_model(Qwen3NextConfig(**SMALL, head_dim=16, num_experts=8))
    assert "\n" not in str(told.value)


def test_a_setting_counts_and_not_the_family() -> None:
    faithful.check_language_model(GraniteConfig(**SMALL))
    with pytest.raises(RefusedInput, match="'granite': inside a stock LLaVA its logits differ"):
        faithful.check_language_model(GraniteConfig(**SMALL, logits_scaling=8.0))


def test_positions_that_are_learnt_end_somewhere() -> None:
    config = OPTConfig(hidden_size=64, ffn_dim=64, num_attention_heads=4, max_position_embeddings=64)
    faithful.check_length(config, 60)
    with pytest.raises(
        RefusedInput, match=r"'opt': it cannot read 199 tokens \(IndexError.*\(it is 200\)"
    ) as told:
        faithful.check_length(config, 200)
    assert "\n" not in str(told.value)


def test_the_config_is_left_as_it_was() -> None:
    config = LlamaConfig(**SMALL, attention_dropout=0.5, tie_word_embeddings=True)
    before = config.to_dict()
    faithful.check_language_model(config)
    assert config.to_dict() == before


def test_a_model_of_more_than_text_is_refused() -> None:
    with pytest.raises(RefusedInput, match="'llava': it has parts for more than text"):
        faithful.check_language_model(LlavaConfig())


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=64),
        LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=DYNAMIC),
        Phi3Config(
            **SMALL,
            pad_token_id=0,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters=LONGROPE,
        ),
    ],
    ids=["window", "dynamic NTK", "longrope"],
)
def test_what_begins_behind_a_length_is_found_at_that_length(config: Any) -> None:
    faithful.check_language_model(config)
    faithful.check_length(config, 60)
    with pytest.raises(RefusedInput, match=r"reads long samples otherwise.*set max_length.*\(it is 200\)"):
        faithful.check_length(config, 200)
