"""The model: a stock LLaVA folder on disk, and the part of its forward pass that training needs.

Shapes: T tokens of a packed row, N images, P tokens per image, K supervised positions, D hidden size.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import (
    AddedToken,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from llava.attention import SEGMENTS
from llava.conversation import IMAGE, TEMPLATES, chat_template
from llava.data.collate import Row
from llava.errors import RefusedInput
from llava.pixels import Pixels

PARTS = {
    "projector": "model.multi_modal_projector.",
    "language_model": ("model.language_model.", "lm_head."),
    "vision_tower": "model.vision_tower.",
}
"""The three parts by the prefix of their parameters' names; the vision tower is never trained (v1, section 4.2)."""

ABOUT = "llava.json"
"""What the stock folder has no place for: the template it was trained with."""


def join(
    vision: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: Any,
    image_processor: Any,
    template: str,
    seed: int,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A stock LLaVA out of a CLIP vision tower and a causal language model, with a fresh `mlp2x_gelu` projector.

    Adds the `<image>` token (and the padding token, where there is none) and resizes the embeddings for it.
    """
    if template not in TEMPLATES:
        raise RefusedInput(f"template {template!r} is unknown; known: {', '.join(sorted(TEMPLATES))}")
    quiet()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE, special=True, normalized=False)]}
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if len(tokenizer) > language.config.vocab_size:
            language.resize_token_embeddings(len(tokenizer), mean_resizing=True)
        patch = vision.config.patch_size
        tokens = (vision.config.image_size // patch) ** 2
        config = LlavaConfig(
            vision_config=vision.config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=tokens,
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=bool(language.config.tie_word_embeddings),
        )
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(template),
    )
    return model, processor


def save(model: LlavaForConditionalGeneration, processor: Any, folder: Path, template: str) -> None:
    """As a folder that stock transformers loads, with the template named in it."""
    quiet()
    with stock_attention(model):
        model.save_pretrained(folder, max_shard_size="4GB")
    processor.chat_template = chat_template(template)
    processor.save_pretrained(folder)
    (folder / ABOUT).write_text(json.dumps({"template": template}, indent=1) + "\n")


def template_of(folder: Path) -> str:
    """The template that the model was trained with."""
    try:
        return str(json.loads((folder / ABOUT).read_text())["template"])
    except FileNotFoundError:
        raise RefusedInput(
            f"{folder} has no {ABOUT}: name the template it was trained with in the config"
        ) from None


def load(folder: Path, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Weights only from safetensors; nothing remote is asked and no code of the folder is run."""
    quiet()
    return LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )


def load_processor(folder: Path) -> Any:
    """Tokenizer and image processor, the latter on Pillow: with torchvision the pixels differ."""
    return AutoProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, backend="pil"
    )


def load_config(folder: Path) -> LlavaConfig:
    """The model's config, without its weights."""
    return LlavaConfig.from_pretrained(folder, local_files_only=True)


def image_tokens(model_config: LlavaConfig) -> int:
    """Tokens that one image takes in the text."""
    return int(model_config.image_seq_length)


def set_trainable(model: nn.Module, parts: list[str]) -> list[str]:
    """Let exactly `parts` train; returns the names of the trainable parameters, sorted."""
    wanted = tuple(prefix for part in parts for prefix in _prefixes(part))
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
        if parameter.requires_grad:
            names.append(name)
    return sorted(names)


def _prefixes(part: str) -> tuple[str, ...]:
    prefix = PARTS[part]
    return prefix if isinstance(prefix, tuple) else (prefix,)


class LlavaForTraining(nn.Module):
    """The stock model on packed rows: frozen tower, attention inside samples, logits only where there is a label."""

    def __init__(self, model: LlavaForConditionalGeneration, pixels: Pixels):
        super().__init__()
        self.stock = model
        self.pixels = pixels
        model.model.language_model.set_attn_implementation(SEGMENTS)

    def forward(self, row: Row) -> torch.Tensor:
        """The sum (not the mean) of the cross-entropy over the row's K supervised tokens, a scalar in fp32."""
        inner = self.stock.model
        embeds_TD = inner.get_input_embeddings()(row.input_ids)
        features = inner.multi_modal_projector(self._patches(row.pixels))
        embeds_TD = embeds_TD.index_copy(0, row.image_positions, features.flatten(0, 1).to(embeds_TD.dtype))
        hidden_TD = inner.language_model(
            inputs_embeds=embeds_TD.unsqueeze(0),
            position_ids=row.position_ids.unsqueeze(0),
            segments=row.segments,
            use_cache=False,
        ).last_hidden_state[0]
        logits_KV = self.stock.lm_head(hidden_TD.index_select(0, row.predict))
        return functional.cross_entropy(logits_KV.float(), row.targets, reduction="sum")

    @torch.no_grad()
    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> (N, P, D_vision): the layer and the rule for CLS come from the config."""
        config, tower = self.stock.config, self.stock.model.vision_tower
        layers = config.vision_feature_layer
        states = tower(self.pixels.normalise(pixels, tower.dtype), output_hidden_states=True).hidden_states
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        first = 1 if config.vision_feature_select_strategy == "default" else 0
        return torch.cat([state[:, first:] for state in chosen], dim=-1)


@contextlib.contextmanager
def stock_attention(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """SDPA with masks while the body runs: what generation and the saved config need."""
    text = model.model.language_model
    before = text.config._attn_implementation
    text.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        text.set_attn_implementation(before)


def quiet() -> None:
    """Bars for files that load in a moment, and advice on resizing that was followed on purpose, say nothing."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
