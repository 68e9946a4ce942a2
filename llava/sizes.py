"""The shapes of a LLaVA and what follows from them by arithmetic: parameters and floating-point operations.

Nothing is imported that needs a device or a download, so that a plan can be made where neither is at hand.
A multiplication with an addition counts as two operations. N, the number behind "4N" and "6N", is the weights
that every token of the language model meets: those of its layers. The vocabulary projection is counted apart,
at supervised positions only, since only those are computed; the embedding is a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llava.errors import RefusedInput
from llava.towers import family_of
from llava.towers.base import VisionSizes
from llava.towers.clip import ClipSizes

Projector = Literal["linear", "mlp2x_gelu"]
Training = Literal["frozen", "full", "lora"]


@dataclass(frozen=True)
class LanguageSizes:
    """A causal language model of the Llama family: grouped attention, a gated perceptron, RMS norms."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    """Size of one attention head."""
    vocabulary: int
    tied: bool = False
    """Whether the vocabulary projection is the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each matrix of a layer."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        d, f = self.hidden, self.intermediate
        return [(d, queries), (d, keys), (d, keys), (queries, d), (d, f), (d, f), (f, d)]

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that multiply each token."""
        return sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def token_weights(self) -> int:
        """N: the weights of all layers."""
        return self.layers * self.layer_weights

    @property
    def parameters(self) -> int:
        """All of them, as transformers counts, the vocabulary projection included."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        extras = 2 * self.hidden
        extras += (queries + 2 * keys) * self.qkv_bias + self.hidden * self.output_bias
        extras += 2 * self.head * self.qk_norm
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.token_weights + self.layers * extras + self.hidden + ends

    def lora_parameters(self, rank: int) -> int:
        """Two thin matrices beside each matrix of the layers."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linear)


@dataclass(frozen=True)
class Sizes:
    """A LLaVA: tower, projector, language model, and how the one is read into the other."""

    vision: VisionSizes
    language: LanguageSizes
    projector: Projector = "mlp2x_gelu"
    feature_layer: int = -2
    keep_cls: bool = False

    @property
    def image_tokens(self) -> int:
        """Tokens that one picture takes in the text."""
        return self.vision.positions if self.keep_cls else self.vision.patches

    @property
    def projector_layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the projector's layers that learn."""
        first = (self.vision.hidden, self.language.hidden)
        second = (self.language.hidden, self.language.hidden)
        return [first] if self.projector == "linear" else [first, second]

    @property
    def projector_parameters(self) -> int:
        """Weights and biases that learn; the identity beside a linear projector is none of them."""
        return sum(inputs * outputs + outputs for inputs, outputs in self.projector_layers)

    @property
    def parameters(self) -> int:
        """All that is stored: a linear projector is kept with an identity as its second layer."""
        second = self.language.hidden**2 + self.language.hidden if self.projector == "linear" else 0
        return self.vision.parameters + self.projector_parameters + second + self.language.parameters

    def trainable(self, training: Training, rank: int = 0, tower: bool = False) -> int:
        """Parameters that learn: the projector, and of the language model nothing, all, or LoRA's.

        `tower`: and of the vision tower what the features depend on.
        """
        language = {
            "frozen": 0,
            "full": self.language.parameters,
            "lora": self.language.lora_parameters(rank),
        }
        vision = self.vision.parameters_up_to(read_layers(self)) if tower else 0
        return self.projector_parameters + language[training] + vision


class Work(NamedTuple):
    """What is computed: sums over samples."""

    tokens: float
    """Tokens of the language model, those of pictures included."""
    squares: float
    """Sum of the squared lengths: attention stays inside a sample."""
    supervised: float
    """Positions that reach the vocabulary."""
    images: float

    @classmethod
    def of(cls, lengths: Sequence[float], supervised: float, images: float) -> Work:
        """Of samples with these lengths in tokens."""
        return cls(sum(lengths), sum(length**2 for length in lengths), supervised, images)


@dataclass(frozen=True)
class Flops:
    """Operations that the model asks for; what is computed twice to save memory is none of them."""

    language: float
    """Matrices of the layers: 2N forward, 2N for the gradients of what flows, 2N for those of the weights."""
    vocabulary: float
    attention: float
    """Scores and sums over values, half of the square since it looks back only."""
    projector: float
    vision: float

    @property
    def matrices(self) -> float:
        """What MFU is measured by: 4N or 6N per token, and the vocabulary at supervised positions."""
        return self.language + self.vocabulary

    @property
    def total(self) -> float:
        """All parts."""
        return self.language + self.vocabulary + self.attention + self.projector + self.vision


def flops(sizes: Sizes, work: Work, training: Training, rank: int = 0, tower: bool = False) -> Flops:
    """Operations of training on `work` once, forward and backward.

    A frozen matrix needs 4 per weight and token (forward, and the gradient of its input), one that learns 6. A frozen
    tower needs 2, since nothing before the projector learns; one that learns (`tower`) 6, and 4 for the patches'
    matrix, since pixels need no gradient. It is computed up to the layer that is read.
    """
    language, vision = sizes.language, sizes.vision
    factor = 6 if training == "full" else 4
    adapters = 6 * language.lora_parameters(rank) if training == "lora" else 0
    first, *rest = [inputs * outputs for inputs, outputs in sizes.projector_layers]
    into, ways = (6, 3) if tower else (4, 1)
    position = 2 * vision.layer_weights + 4 * vision.positions * vision.hidden
    patch = 2 * 3 * vision.patch**2 * vision.hidden * vision.patches
    return Flops(
        language=(factor * language.token_weights + adapters) * work.tokens,
        # The head is no target of LoRA.
        vocabulary=factor * language.vocabulary * language.hidden * work.supervised,
        attention=3 * 2 * language.layers * language.heads * language.head * work.squares,
        projector=(into * first + 6 * sum(rest)) * sizes.image_tokens * work.images,
        vision=(ways * read_layers(sizes) * position * vision.positions + min(ways, 2) * patch) * work.images,
    )


def read_layers(sizes: Sizes) -> int:
    """Layers of the tower up to the hidden state that is read."""
    return sizes.feature_layer % (sizes.vision.layers + 1)


NF4_BLOCK = 64
"""Weights of a matrix in 4 bit that share a scale (arXiv 2305.14314, section 3)."""


def nf4_bytes(inputs: int, outputs: int) -> int:
    """Bytes of a matrix in 4 bit whose scales are quantised once more.

    Half a byte for each weight, a byte for each block, 4 for each 256 blocks; and beside each matrix, in fp32, the
    values that 4 and 8 bits stand for, and the mean of the scales.
    """
    weights = inputs * outputs
    blocks = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def flops_per_token(sizes: Sizes, training: Training) -> int:
    """4N where the language model is frozen or carries LoRA, 6N where it learns: what MFU counts per token."""
    return (6 if training == "full" else 4) * sizes.language.token_weights


CLIP_L14 = ClipSizes(1024, 4096, 24, 16, 224, 14)
CLIP_L14_336 = ClipSizes(1024, 4096, 24, 16, 336, 14)
VICUNA_7B = LanguageSizes(4096, 11008, 32, 32, 32, 128, 32000)
VICUNA_13B = LanguageSizes(5120, 13824, 40, 40, 40, 128, 32000)

PUBLISHED: dict[str, VisionSizes | LanguageSizes] = {
    "openai/clip-vit-large-patch14": CLIP_L14,
    "openai/clip-vit-large-patch14-336": CLIP_L14_336,
    "lmsys/vicuna-7b-v1.3": VICUNA_7B,
    "lmsys/vicuna-13b-v1.3": VICUNA_13B,
    "lmsys/vicuna-7b-v1.5": VICUNA_7B,
    "lmsys/vicuna-13b-v1.5": VICUNA_13B,
}
"""What the presets name, from the papers of CLIP (arXiv 2103.00020, table 20) and LLaMA (2302.13971, table 2)."""

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def vision_sizes(config: dict[str, Any]) -> VisionSizes:
    """From the `config.json` of a vision tower; a whole CLIP's `vision_config` counts too."""
    config = {**config, **config.get("vision_config", {})}
    return family_of(config.get("model_type")).sizes.of(config)


def language_sizes(config: dict[str, Any]) -> LanguageSizes:
    """From the `config.json` of a language model of the Llama family."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise RefusedInput(f"language model of type {family!r}: sizes are known of {', '.join(_FAMILIES)}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return LanguageSizes(
            hidden,
            int(config["intermediate_size"]),
            int(config["num_hidden_layers"]),
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
            int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
            output_bias=family in ("llama", "qwen3") and bool(config.get("attention_bias", False)),
            qk_norm=family == "qwen3",
        )
    except KeyError as missing:
        raise RefusedInput(f"config of a {family} model names no {missing}") from None


def llava_sizes(config: dict[str, Any]) -> Sizes:
    """From the `config.json` of a stock LLaVA folder, as a dictionary with its defaults filled in."""
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise RefusedInput("several feature layers: sizes are known for one")
    return Sizes(
        vision_sizes(config["vision_config"]),
        language_sizes(config["text_config"]),
        "linear" if config.get("projector_hidden_act") == "linear" else "mlp2x_gelu",
        layer,
        keep_cls=config.get("vision_feature_select_strategy") == "full",
    )
