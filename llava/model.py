"""The model: a stock LLaVA folder on disk, and the part of its forward pass that training needs.

Shapes: T tokens of a packed row, N images, P tokens per image, K supervised positions, D hidden size.
"""

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import (
    AddedToken,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from llava import export, pretrained
from llava.agreement import NOT_READ, agree, features
from llava.choices import Fit
from llava.conversation import Encoder
from llava.data.collate import PackedRow
from llava.data.jsonl import from_json
from llava.errors import RefusedInput
from llava.packing import MASKED, layers_of, packed_hidden_states, set_packing, stock_attention_of, ties
from llava.pixels import Pixels, fitted
from llava.templates import chat_template, check_name, is_chat
from llava.text_tokenizer import IMAGE
from llava.towers import family_of

PARTS = {
    "projector": "model.multi_modal_projector.",
    "language_model": ("model.language_model.", "lm_head."),
    "vision_tower": "model.vision_tower.",
}
"""The three parts by the prefix of their parameters' names. In the papers the vision tower stays frozen (v1, section
4.2); it learns where `finetune.vision_learning_rate` is set."""

_IDENTITY = "model.multi_modal_projector.linear_2."

ABOUT = "llava.json"
"""What the stock folder has no place for: the template it was trained with."""


@dataclass(frozen=True)
class Reading:
    """How the tower is read into the language model (v1, section 4.1; v1.5, section 3.3)."""

    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    feature_layer: int = -2
    """Which of the tower's hidden states; -1 is the last."""
    keep_cls: bool = False


def join(
    vision: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: Any,
    image_processor: Any,
    template: str,
    seed: int,
    reading: Reading | None = None,
    pad_to: int | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A stock LLaVA out of a vision tower and a causal language model, with a fresh projector in their dtype.

    Adds the `<image>` token (and the padding token, where there is none) and enlarges the vocabulary for it, to a
    multiple of `pad_to`. Both parts are taken over as they are, not copied: only the projector is new. Raises
    `RefusedInput` for a tower or a language model that a stock LLaVA would compute otherwise.
    """
    check_name(template)
    reading = reading or Reading()
    quiet()
    cls = _cls_positions(vision, reading)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE, special=True, normalized=False)]}
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    # A template that this tokenizer cannot write is refused here, not after an hour.
    Encoder(tokenizer, template, image_tokens=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocabulary = max(len(tokenizer), language.config.vocab_size)
        if vocabulary > language.config.vocab_size or (pad_to and vocabulary % pad_to):
            language.resize_token_embeddings(vocabulary, pad_to_multiple_of=pad_to, mean_resizing=True)
        apart = _untie(language)
        config = LlavaConfig(
            vision_config=vision.config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            projector_hidden_act="linear" if reading.projector == "linear" else "gelu",
            vision_feature_layer=reading.feature_layer,
            vision_feature_select_strategy="default" if cls and not reading.keep_cls else "full",
            tie_word_embeddings=bool(language.config.tie_word_embeddings),
        )
        config.image_seq_length = features(config)
        # Weights that would be thrown away at once are never made: a 13B is in memory once.
        model = empty(config)
        model.model.multi_modal_projector.to_empty(device="cpu")
        _initialise(model.model.multi_modal_projector, reading.projector, config.text_config)
    model.model.multi_modal_projector.to(language.dtype)
    tower: nn.Module = vision
    model.model.vision_tower = tower.to(dtype=language.dtype)
    model.model.language_model = language.base_model
    head: Any = language.get_output_embeddings()
    model.lm_head = copy.deepcopy(head) if apart else head
    model.tie_weights()
    model.eval()
    _check_same(model, language)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=cls,
        chat_template=chat_template(template, tokenizer),
    )
    return model, processor


def _untie(language: PreTrainedModel) -> bool:
    """Where a stock LLaVA cannot share embedding and head of this type, its config says so; returns whether."""
    apart = bool(getattr(language.config, "tie_word_embeddings", False)) and not ties(language)
    if apart:
        language.config.tie_word_embeddings = False
    return apart


def _cls_positions(vision: PreTrainedModel, reading: Reading) -> int:
    """Positions before the patches; refuses a tower or a layer that cannot be read."""
    kind, layers = vision.config.model_type, vision.config.num_hidden_layers
    before = family_of(kind).before_patches
    if reading.keep_cls and not before:
        raise RefusedInput(f"keep_cls: a tower of type {kind!r} has no CLS position to keep")
    if reading.feature_layer == 0:
        raise RefusedInput(f"feature_layer 0: {NOT_READ}")
    if not -layers - 1 <= reading.feature_layer <= layers:
        raise RefusedInput(f"feature_layer {reading.feature_layer}: the vision tower has {layers} layers")
    return before


@torch.no_grad()
def _initialise(projector: Any, kind: str, text: Any) -> None:
    """As stock LLaVA begins; a single linear layer is kept with an identity behind it."""
    std = getattr(text, "initializer_range", None) or 0.02
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    if kind == "linear":
        nn.init.eye_(projector.linear_2.weight)


@torch.inference_mode()
def _check_same(model: LlavaForConditionalGeneration, language: PreTrainedModel) -> None:
    """A language model that scales or caps its logits, say, would be another one inside a stock LLaVA."""
    ids = torch.arange(8).unsqueeze(0)
    if not torch.equal(model(input_ids=ids).logits, language.eval()(input_ids=ids).logits):
        raise RefusedInput(
            f"language model of type {language.config.model_type!r}: inside a stock LLaVA its logits differ from "
            "its own; take one whose head is a plain projection, such as llama, mistral or qwen"
        )


def check_packing(config: LlavaConfig, max_length: int) -> None:
    """Refuse a language model whose attention is not plainly causal over `max_length` tokens.

    Packed rows attend to their own sample, causally and over all of it; a window that is shorter than a sample,
    or scores that are capped, would be ignored in training and not at inference.
    """
    text: Any = config.text_config
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window and window < max_length:
        raise RefusedInput(
            f"the language model attends over {window} tokens at most: set max_length to {window} or less "
            f"(it is {max_length})"
        )
    if (read := _unscaled(text)) and read < max_length:
        raise RefusedInput(
            f"the language model scales its positions beyond {read} tokens, and by the longest sample of a row: set "
            f"max_length to {read} or less (it is {max_length})"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise RefusedInput(f"language model of type {text.model_type!r}: capped attention cannot be packed")


def _unscaled(text: Any) -> int | None:
    """Tokens that a model reads before dynamic NTK or longrope begin to change its positions."""
    found = getattr(text, "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    lengths = [
        each.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for each in kinds
        if each.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(lengths, default=None)


def save(model: LlavaForConditionalGeneration, processor: Any, folder: Path, template: str) -> None:
    """As a folder that stock transformers loads, with the template named in it."""
    _prepare(model, processor, template)
    with stock_attention(model):
        export.write(model, processor, folder)
    write_about(folder, template)


def save_around(
    model: LlavaForConditionalGeneration, dtype: torch.dtype, processor: Any, folder: Path, template: str
) -> None:
    """What `save` writes beside the weights, which are in `dtype`."""
    _prepare(model, processor, template)
    with stock_attention(model):
        export.write_around(model, dtype, processor, folder)
    write_about(folder, template)


def _prepare(model: LlavaForConditionalGeneration, processor: Any, template: str) -> None:
    """Where an answer ends, and how one asks."""
    quiet()
    given = model.generation_config.eos_token_id
    ends = {
        *(given if isinstance(given, list) else [given]),
        *Encoder(processor.tokenizer, template, 0).stop_ids,
    }
    ends -= {None}
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    if processor.tokenizer.pad_token_id is not None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.config.image_seq_length = features(model.config)
    # A caption is no answer to a question: stage 1 leaves the way to ask as it found it.
    if is_chat(template) or not processor.chat_template:
        processor.chat_template = chat_template(template, processor.tokenizer)


def write_about(folder: Path, template: str) -> None:
    """Name the template in a stock folder."""
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
    """Weights only from safetensors; nothing remote is asked and no code of the folder is run.

    Weights that are missing are refused: transformers would make them up. So are layers that the config does not count.
    """
    quiet()
    attention: Any = "sdpa"
    if (text := stock_attention_of(load_config(folder).text_config)) != attention:
        attention = {"": "sdpa", "text_config": text, "vision_config": "sdpa"}
    loaded: LlavaForConditionalGeneration = pretrained.model(
        LlavaForConditionalGeneration, folder, whole=True, dtype=dtype, attn_implementation=attention
    )
    return loaded


def empty(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The model without weights, on `meta`: names and shapes."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def load_processor(folder: Path, fit: Fit = "model") -> Any:
    """Tokenizer and image processor, with what older transformers left out filled in from the config.

    Raises `RefusedInput` where processor and config contradict each other.
    `fit` changes how a picture becomes a square; saved with the processor, it holds for generation too.
    """
    processor, config = pretrained.processor(folder), load_config(folder)
    with pretrained.reading(f"{folder} cannot be used"):
        agree(folder, config, processor)
    if fit != "model":
        vision: Any = config.vision_config
        edge = vision.image_size
        processor.image_processor = fitted(processor.image_processor, fit, edge)
    return processor


def dtype_of(config: LlavaConfig) -> torch.dtype:
    """The precision that a folder's weights are kept in; fp32 where it names none."""
    named = config.dtype
    return named if isinstance(named, torch.dtype) else getattr(torch, named or "float32")


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The one precision of all floating weights in a folder's files, whatever its config says; None where they differ.

    Loaded in it, weights are mapped into memory and none is rounded.
    """
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            table = from_json(file.read(int.from_bytes(file.read(8), "little")))
        found |= {entry["dtype"] for name, entry in table.items() if name != "__metadata__"}
    kinds = {_FLOATING[name] for name in found if name in _FLOATING}
    return kinds.pop() if len(kinds) == 1 else None


_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_config(folder: Path) -> LlavaConfig:
    """The model's config, without its weights."""
    config: LlavaConfig = pretrained.config(LlavaConfig, folder)
    return config


def image_tokens(config: LlavaConfig) -> int:
    """Tokens that one image takes in the text: the features that the tower gives."""
    return features(config)


def image_cost(model: LlavaForConditionalGeneration) -> float:
    """Work of an image in the tower, in tokens of the language model: one way in three where the tower is frozen."""
    tower, text = model.model.vision_tower, model.model.language_model
    ways = 3 if learns(tower) else 1
    seen = (tower.config.image_size // tower.config.patch_size) ** 2 * sum(
        p.numel() for p in tower.parameters()
    )
    return float(ways * seen / (3 * sum(p.numel() for p in layers_of(text).parameters())))


def set_trainable(model: LlavaForConditionalGeneration, parts: list[str]) -> list[str]:
    """Let exactly `parts` train; returns the names of the trainable parameters, sorted.

    Of a linear projector the identity that stands in for a second layer never does. Of the vision tower that is so
    for whatever no feature depends on, such as layers behind the one that is read: each parameter that trains has a
    gradient in every step, as ZeRO needs it.
    """
    wanted = tuple(prefix for part in parts for prefix in _prefixes(part))
    fixed: tuple[str, ...] = (_IDENTITY,) if model.config.projector_hidden_act == "linear" else ()
    if "vision_tower" in parts:
        fixed += tuple(_unread(model))
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted) and not name.startswith(fixed))
        if parameter.requires_grad:
            names.append(name)
    return sorted(names)


def learns(module: nn.Module) -> bool:
    """Whether any of its parameters trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _unread(model: LlavaForConditionalGeneration) -> list[str]:
    """Names of the tower's parameters that no feature depends on: measured without weights, not listed."""
    tower: Any = model.model.vision_tower
    edge = tower.config.image_size
    own = {
        name: torch.empty(getattr(value, "ds_shape", value.shape), device="meta", requires_grad=True)
        for name, value in tower.named_parameters()
    }
    buffers = {name: value.to("meta") for name, value in tower.named_buffers()}
    pixels = torch.empty(1, 3, edge, edge, device="meta")
    with torch.enable_grad():
        read = torch.func.functional_call(_Features(model), _under("tower.", own | buffers), (pixels,))
        found = torch.autograd.grad(read.sum(), list(own.values()), allow_unused=True)
    unread = [name for name, gradient in zip(own, found, strict=True) if gradient is None]
    return [f"{PARTS['vision_tower']}{name}" for name in unread]


def _under(prefix: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in values.items()}


class _Features(nn.Module):
    """What the projector reads of the tower, as a module of its own."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.tower, self.config = model.model.vision_tower, model.config

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, P, D_vision): the layer and the rule for CLS come from the config."""
        vision: Any = self.config.vision_config
        layers, count = self.config.vision_feature_layer, vision.num_hidden_layers + 1
        read = [layer % count for layer in ([layers] if isinstance(layers, int) else layers)]
        states = hidden_states(self.tower, pixel_values, max(read))
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        return torch.cat([states[layer][:, first:] for layer in read], dim=-1)


def _prefixes(part: str) -> tuple[str, ...]:
    prefix = PARTS[part]
    return prefix if isinstance(prefix, tuple) else (prefix,)


class LlavaForTraining(nn.Module):
    """The stock model on packed rows: attention inside samples, logits only where there is a label.

    Every row runs the tower, on a blank picture where it has none, so that ranks stay equal where the tower learns:
    what a blank one gives reaches no loss, and its gradients are zeros.
    """

    def __init__(self, model: LlavaForConditionalGeneration, pixels: Pixels, attention: str = "auto"):
        """`attention`: a key of `llava.attention.PACKING`."""
        super().__init__()
        self.stock = model
        self.pixels = pixels
        set_packing(model.model.language_model, attention)

    def forward(self, row: PackedRow) -> torch.Tensor:
        """The sum (not the mean) of the cross-entropy over the row's K supervised tokens, a scalar in fp32."""
        inner = self.stock.model
        embeds_TD = inner.get_input_embeddings()(row.input_ids)
        features = inner.multi_modal_projector(self._patches(row.pixels))
        used = features.flatten(0, 1)[: len(row.image_positions)].to(embeds_TD.dtype)
        embeds_TD = embeds_TD.index_copy(0, row.image_positions, used)
        hidden_TD = packed_hidden_states(inner.language_model, embeds_TD, row.position_ids, row.segments)
        return self.loss(hidden_TD.index_select(0, row.predict), row.targets)

    def loss(self, hidden_KD: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
        """The summed cross-entropy at supervised positions, a scalar in fp32."""
        logits_KV = self.stock.lm_head(hidden_KD)
        return functional.cross_entropy(logits_KV.float(), targets_K, reduction="sum")

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> (N, P, D_vision); without gradients where the tower is frozen."""
        tower = self.stock.model.vision_tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(tower)):
            features: torch.Tensor = _Features(self.stock)(self.pixels.normalise(pixels, tower.dtype))
        return features


def hidden_states(tower: PreTrainedModel, pixel_values: torch.Tensor, last: int) -> list[torch.Tensor]:
    """(N, 3, H, W) -> `last` + 1 times (N, 1 + P or P, D_vision): the stock tower's hidden states, as far as read.

    The layers behind them, with CLIP one of 24, are not computed.
    """
    states = family_of(tower.config.model_type).states(tower, pixel_values)
    return list(itertools.islice(states, last + 1))


@contextlib.contextmanager
def stock_attention(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Its own attention with masks, SDPA where it has it, while the body runs: for generation and the saved config."""
    text = model.model.language_model
    if text.config.model_type in MASKED:
        yield
        return
    before = text.config._attn_implementation
    text.set_attn_implementation(stock_attention_of(text.config))
    try:
        yield
    finally:
        text.set_attn_implementation(before)


def quiet() -> None:
    """Bars for files that load in a moment, and advice on resizing that was followed on purpose, say nothing."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
