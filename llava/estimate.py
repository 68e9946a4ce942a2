"""What training will need, before anything is paid for: memory per GPU by part, operations, hours, and a choice.

Plain arithmetic on `llava.sizes`, without torch. Memory is what the program allocates at its peak. Static parts
(weights, gradients, optimizer) are exact for the engines that we use; activations count the tensors that the
stock layers keep for the backward pass; the rest is stated in `Reserve`. All sizes are bytes, all times seconds
unless a name says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from llava.choices import Checkpointing
from llava.errors import RefusedInput
from llava.sizes import Flops, Sizes, Training, Work, flops, nf4_bytes, read_layers

GIB = 2**30
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
ROWS = (2048, 4096, 8192, 16384, 32768)
"""Token budgets of a row that a choice tries."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as its vendor's data sheet has it."""

    memory_gib: int
    tflops: float
    """bf16 matrices with fp32 sums, dense."""
    link: float
    """GB/s to its neighbours, one direction."""


GPUS = {
    "a100-40g": Gpu(40, 312, 300),
    "a100-80g": Gpu(80, 312, 300),
    "h100-80g": Gpu(80, 989, 450),
    "h200-141g": Gpu(141, 989, 450),
    "l4-24g": Gpu(24, 121, 32),
    "l40s-48g": Gpu(48, 362, 32),
    "rtx4090-24g": Gpu(24, 165, 32),
}
"""NVIDIA's data sheets: SXM boards with NVLink for A100, H100 and H200, PCIe 4.0 x16 for the others."""


@dataclass(frozen=True)
class Reserve:
    """What no formula gives."""

    card: float = 0.06
    """Share of the card that the driver, error correction, the CUDA context and NCCL keep."""
    fragmentation: float = 0.05
    """Of what the program allocates, lost between its blocks."""
    margin: float = 0.1
    """Of what a card can give, that a choice leaves free where it can: the arithmetic is not exact."""


RESERVE = Reserve()


@dataclass(frozen=True)
class Setup:
    """How a stage is run."""

    training: Training
    """What of the language model learns; the projector always does."""
    gpus: int = 1
    zero_stage: int = 2
    tokens_per_row: int = 4096
    checkpointing: Checkpointing = "full"
    precision: Literal["fp32", "bf16"] = "bf16"
    lora_rank: int = 0
    lora_dropout: bool = True
    lora_bits: int = 16
    """Of the language model's matrices: 4 is QLoRA."""
    tower: bool = False
    """Whether the vision tower learns, too."""
    fused_loss: bool = False
    """Whether the vocabulary projection and its cross-entropy are computed in chunks."""
    reduce_bucket: int = 500_000_000
    """Elements of DeepSpeed's buffer for gradients on their way (its default)."""
    live_parameters: int = 1_000_000_000
    """Elements that ZeRO-3 keeps gathered at most (its default)."""
    offload: bool = False
    """Whether fp32 weights, moments and gradients lie on the host, and the update is made there (ZeRO-2 and 3)."""

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class Corpus:
    """What a stage is trained on, as means over its samples."""

    samples: int
    text_tokens: float
    """Tokens of a sample without those of its picture."""
    supervised_tokens: float
    images: float = 1.0
    """Pictures per sample; text-only samples have none."""
    epochs: float = 1.0
    spread: float = 1.0
    """Mean of the squared length over the square of the mean."""

    def tokens(self, sizes: Sizes) -> float:
        """Tokens of a mean sample, those of pictures included."""
        return self.text_tokens + self.images * sizes.image_tokens

    def work(self, sizes: Sizes, samples: float) -> Work:
        """What `samples` of them ask for."""
        tokens = self.tokens(sizes)
        return Work(
            samples * tokens,
            samples * tokens**2 * self.spread,
            samples * self.supervised_tokens,
            samples * self.images,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from the forward to the backward pass of one row."""
    loss: float
    """Logits at supervised positions, and their gradient."""
    layer: float
    """One layer computed again, where activations are not kept."""
    vision: float
    """The tower's own activations, gone before the language model begins."""
    update: float
    """Copies that the update makes."""
    buffers: float
    """Gradients on their way between GPUs, and gathered weights in ZeRO-3."""
    start: float = 0
    """Before the first step: ZeRO-3 cuts the model a block at a time, and one block is whole on each GPU."""

    @property
    def static(self) -> float:
        """What stays between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> float:
        """The peak. What does not happen at the same time is not added up."""
        backward = self.activations + max(self.loss, self.layer)
        return max(self.static + self.buffers + max(backward, self.vision, self.update), self.start)

    @property
    def total(self) -> float:
        """With what is lost between blocks."""
        return self.allocated * (1 + RESERVE.fragmentation)


def gpu(name: str) -> Gpu:
    """One of `GPUS`; `RefusedInput` where there is none of that name."""
    if name not in GPUS:
        raise RefusedInput(f"GPU {name!r} is unknown; known: {', '.join(GPUS)}")
    return GPUS[name]


def usable(card: Gpu) -> float:
    """Bytes of a card that the program may allocate."""
    return card.memory_gib * GIB * (1 - RESERVE.card)


def heaviest_row(sizes: Sizes, corpus: Corpus, tokens: float) -> Work:
    """A packed row of `tokens` tokens at its worst: as many pictures, and as many supervised tokens, as fit.

    Where some samples are text alone, a row may hold nothing else.
    """
    images = tokens / corpus.tokens(sizes) if corpus.images == 1 else tokens / sizes.image_tokens
    share = corpus.supervised_tokens / (corpus.tokens(sizes) if corpus.images >= 1 else corpus.text_tokens)
    squares = tokens * corpus.tokens(sizes) * corpus.spread
    return Work(tokens, squares, tokens * min(1, share), images if corpus.images else 1)


def memory(sizes: Sizes, setup: Setup, work: Work) -> Memory:
    """What each GPU holds while it computes a row that asks for `work`."""
    learning = sizes.trainable(setup.training, setup.lora_rank, setup.tower)
    stored = sizes.parameters + (
        sizes.language.lora_parameters(setup.lora_rank) if setup.training == "lora" else 0
    )
    gradients, optimizer, buffers, update = _static(setup, stored, learning)
    a = setup.element
    if setup.lora_bits == 4:
        # What is dequantised, a layer of it at most: some kernels keep a matrix until the next is there.
        buffers += a * sizes.language.layer_weights
    kept = a * sizes.language.hidden * work.tokens
    layer = _layer(sizes, setup) * work.tokens
    whole = {"none": layer, "selective": _selective(sizes, setup) * work.tokens, "full": kept}
    ends = kept + _norm(sizes, setup) * work.tokens + _projector(sizes, setup) * work.images
    loaded = _weights(sizes, replace(setup, zero_stage=0), stored)
    vision = _tower(sizes, setup)
    return Memory(
        weights=_weights(sizes, setup, stored),
        gradients=gradients,
        optimizer=optimizer,
        activations=sizes.language.layers * whole[setup.checkpointing] + ends + vision.kept * work.images,
        loss=_loss(sizes, setup) * work.supervised + _head(sizes, setup),
        layer=0 if setup.checkpointing == "none" else max(layer, vision.layer * work.images),
        vision=vision.passing * work.images,
        update=update,
        buffers=buffers,
        start=_start(sizes, setup, loaded) if setup.zero_stage == 3 else 0,
    )


class _Tower(NamedTuple):
    """Bytes per picture in the vision tower."""

    passing: float
    """Gone before the language model begins."""
    kept: float
    """Kept for the backward pass."""
    layer: float
    """One layer computed again."""


def _tower(sizes: Sizes, setup: Setup) -> _Tower:
    """A layer that learns keeps for each norm its input and its result; queries, keys, values and their result; and
    of the perceptron what goes into the activation, what the activation keeps, and what comes out of it."""
    vision, a, layers = sizes.vision, setup.element, read_layers(sizes)
    state = a * vision.positions * vision.hidden
    wide = a * vision.positions * vision.intermediate
    if not setup.tower:
        return _Tower((layers + 1) * state + 2 * wide, 0, 0)
    layer = 8 * state + (2 + vision.gate) * wide
    each = {"none": layer, "selective": 7 * state + wide, "full": state}[setup.checkpointing]
    pixels = a * 3 * vision.image**2
    return _Tower(0, layers * each + state + pixels, layer)


def _weights(sizes: Sizes, setup: Setup, stored: int) -> float:
    """Bytes of `stored` parameters. Of matrices in 4 bit ZeRO-3 cuts the codes, not what scales them."""
    a, gpus = setup.element, setup.gpus if setup.zero_stage == 3 else 1
    if setup.lora_bits == 16:
        return a * stored / gpus
    codes, matrices = sizes.language.token_weights / 2, sizes.language.linear
    scales = sizes.language.layers * sum(nf4_bytes(*each) for each in matrices) - codes
    return (a * (stored - sizes.language.token_weights) + codes) / gpus + scales


def _static(setup: Setup, stored: int, learning: int) -> tuple[float, float, float, float]:
    """Gradients, optimizer, buffers and the update's copies, by ZeRO stage."""
    a, n = setup.element, setup.gpus
    if setup.zero_stage == 0:
        return a * learning, 2 * a * learning, 0, 0
    # fp32 copy and two moments, cut over the GPUs from stage 1 on.
    optimizer = 0 if setup.offload else 12 * learning / n
    bucket = a * setup.reduce_bucket
    if setup.zero_stage == 1:
        # In bf16 the sums of a step are fp32, whole on each GPU, beside the gradient of the last row.
        gradients = float((4 + (a if a < 4 else 0)) * learning)
        return gradients, optimizer, 0 if a < 4 else bucket, 0
    gradients = 0 if setup.offload else 4 * learning / n
    if setup.zero_stage == 2:
        return gradients, optimizer, bucket, 0
    gathered = a * min(setup.live_parameters, stored)
    update = 0 if setup.offload else 4 * min(setup.live_parameters, learning / n)
    return gradients, optimizer, bucket + gathered, update


def _start(sizes: Sizes, setup: Setup, loaded: float) -> float:
    """Before ZeRO-3 has cut all: its part, and a block that is whole. What is in 4 bit is so before the first cut."""
    held = loaded if setup.lora_bits == 4 else loaded / setup.gpus
    return held + setup.element * _block(sizes)


def _block(sizes: Sizes) -> int:
    """Parameters of the largest block that `llava.placing` moves: the tower, a decoder layer, or what is left."""
    language = sizes.language
    ends = language.parameters - language.token_weights
    return max(sizes.vision.parameters, language.layer_weights, ends + sizes.projector_parameters)


def _layer(sizes: Sizes, setup: Setup) -> float:
    """Bytes per token that one decoder layer keeps for its backward pass.

    Each norm: its input in fp32. Attention: queries, keys, values and its result. The perceptron: gate, its SiLU,
    and what they multiply. A matrix that learns keeps its input as well.
    """
    language, a = sizes.language, setup.element
    queries, keys = language.heads * language.head, language.kv_heads * language.head
    kept = 2 * 4 * language.hidden + a * (2 * queries + 2 * keys) + 3 * a * language.intermediate
    if setup.training == "frozen":
        return kept
    inputs = 2 * language.hidden + queries + language.intermediate
    if setup.training == "lora":
        if setup.lora_dropout:
            # Each adapter drops out for itself: its input, and a byte that says what was dropped.
            dropped = sum(inputs for inputs, _ in language.linear)
            return kept + (a + 1) * dropped + a * len(language.linear) * setup.lora_rank
        return kept + a * (inputs + len(language.linear) * setup.lora_rank)
    return kept + a * (inputs + 2 * language.hidden)


def _selective(sizes: Sizes, setup: Setup) -> float:
    """Bytes per token and layer where attention's and the matrices' results stay and the rest is computed again."""
    language, a = sizes.language, setup.element
    results = (
        language.hidden + language.heads * language.head + sum(outputs for _, outputs in language.linear)
    )
    if setup.training == "lora":
        results += sum(setup.lora_rank + outputs for _, outputs in language.linear)
    return a * results


def _loss(sizes: Sizes, setup: Setup) -> float:
    """Bytes per supervised position.

    Logits as computed, in fp32, and their logarithms; then the gradient in fp32 and as computed. In chunks, these
    exist for about as many elements as twice the input has.
    """
    a, hidden = setup.element, sizes.language.hidden
    logits = 8 + (a if a < 4 else 0)
    return logits * 2 * hidden + a * hidden if setup.fused_loss else logits * sizes.language.vocabulary


def _head(sizes: Sizes, setup: Setup) -> float:
    """The sum of the head's gradient over the chunks, in fp32."""
    learns = setup.fused_loss and setup.training == "full"
    return 4 * sizes.language.vocabulary * sizes.language.hidden if learns else 0


def _norm(sizes: Sizes, setup: Setup) -> float:
    """The last norm, bytes per token."""
    return (4 + (setup.element if setup.training == "full" else 0)) * sizes.language.hidden


def _projector(sizes: Sizes, setup: Setup) -> float:
    """Inputs of the projector's layers and of its activation, bytes per picture."""
    inputs = sum(inputs for inputs, _ in sizes.projector_layers)
    gelu = sizes.language.hidden if sizes.projector == "mlp2x_gelu" else 0
    return setup.element * (inputs + gelu) * sizes.image_tokens


def step_flops(sizes: Sizes, setup: Setup, corpus: Corpus, samples: float) -> Flops:
    """Operations of `samples` mean samples, nothing computed twice."""
    return flops(sizes, corpus.work(sizes, samples), setup.training, setup.lora_rank, setup.tower)


def mfu(done: Flops, seconds: float, card: Gpu, gpus: int = 1) -> float:
    """Model FLOPs utilisation: 4N or 6N per token, and the vocabulary, over what the GPUs could have done."""
    return done.matrices / (seconds * gpus * card.tflops * 1e12)


def hours(sizes: Sizes, setup: Setup, corpus: Corpus, card: Gpu, at_mfu: float) -> float:
    """Hours of a stage on `setup.gpus` of `card` at this MFU."""
    done = step_flops(sizes, setup, corpus, corpus.samples * corpus.epochs)
    return done.matrices / (at_mfu * setup.gpus * card.tflops * 1e12) / 3600


@dataclass(frozen=True)
class Choice:
    """One way to run a stage."""

    setup: Setup
    memory: Memory
    seconds: float
    """Of one update, at half of the card's peak and with links that nothing hides: to compare choices by."""
    fits: bool
    roomy: bool
    """Whether it leaves the margin free."""

    @property
    def name(self) -> str:
        """For people."""
        setup = self.setup
        return f"ZeRO-{setup.zero_stage}, {setup.tokens_per_row} tokens per row, checkpointing {setup.checkpointing}"


def choices(
    sizes: Sizes,
    setup: Setup,
    corpus: Corpus,
    card: Gpu,
    global_batch: int,
    max_length: int,
    zero_stages: Iterable[int] = (0, 1, 2, 3),
    rows: Iterable[int] = ROWS,
    checkpointing: Iterable[Checkpointing] = CHECKPOINTING,
) -> Iterator[Choice]:
    """Every combination, with what it needs."""
    share = global_batch / setup.gpus * corpus.tokens(sizes)
    for zero_stage, tokens, saving in itertools.product(zero_stages, rows, checkpointing):
        if zero_stage == 0 and setup.precision == "bf16":
            continue
        tried = replace(setup, zero_stage=zero_stage, tokens_per_row=tokens, checkpointing=saving)
        # A GPU's part of a batch is the mean and at most a sample more; a long sample has a row to itself.
        longest = min(max(tokens, max_length), share + max_length)
        needed = memory(sizes, tried, heaviest_row(sizes, corpus, longest))
        seconds = _seconds(sizes, tried, corpus, card, global_batch)
        given = usable(card)
        yield Choice(
            tried, needed, seconds, needed.total <= given, needed.total <= given * (1 - RESERVE.margin)
        )


def _seconds(sizes: Sizes, setup: Setup, corpus: Corpus, card: Gpu, global_batch: int) -> float:
    """One update: what is computed, what is computed again, and what travels."""
    done = step_flops(sizes, setup, corpus, global_batch / setup.gpus)
    forward = done.language / (3 if setup.training == "full" else 2) + done.attention / 3
    forward += done.vision / 3 if setup.tower else 0
    again = {"none": 0.0, "selective": done.attention / 3, "full": forward}[setup.checkpointing]
    compute = (done.total + again) / (0.5 * card.tflops * 1e12)
    rows = max(1, math.ceil(global_batch / setup.gpus * corpus.tokens(sizes) / setup.tokens_per_row))
    learning, a = sizes.trainable(setup.training, setup.lora_rank, setup.tower), setup.element
    apart = 1 - 1 / setup.gpus
    per_row = {0: 0, 1: 0, 2: a * learning, 3: a * (2 * sizes.parameters + learning)}[setup.zero_stage]
    per_step = {0: 8 * learning, 1: (4 + a) * learning, 2: a * learning, 3: 0}[setup.zero_stage]
    travel = apart * (rows * per_row + per_step) / (card.link * 1e9)
    return compute + travel + rows * _ROW_OVERHEAD + offloaded_seconds(setup, sizes)


def offloaded_seconds(setup: Setup, sizes: Sizes) -> float:
    """What an update on the host adds: gradients down and weights up over PCIe, and AdamW in the host's memory."""
    if not setup.offload:
        return 0
    learning = sizes.trainable(setup.training, setup.lora_rank, setup.tower)
    return learning / setup.gpus * (2 * setup.element / _PCIE + _ADAMW_TRAFFIC / _HOST_MEMORY)


_PCIE = 25e9
"""Bytes per second of a GPU to its host, one direction: PCIe 4.0 x16 as it is usually measured."""
_HOST_MEMORY = 20e9
"""Bytes per second of the host's memory that one rank can count on, beside seven others on a server of two sockets."""
_ADAMW_TRAFFIC = 28
"""Bytes that AdamW reads and writes per parameter: weight, two moments (each both ways) and the gradient, in fp32."""

_ROW_OVERHEAD = 0.01
"""Seconds that a row costs beside its arithmetic (launches, the planner's uneven ends): prefers fewer rows."""


def choose(
    found: Sequence[Choice], card: Gpu, what: str, ways_out: Callable[[], Sequence[str]] = tuple
) -> Choice:
    """The fastest that fits, with room to spare where there is one; `RefusedInput` names the least need.

    `ways_out` is asked where nothing fits: what would.
    """
    fitting = [each for each in found if each.fits]
    if not fitting:
        least = min(found, key=lambda each: each.memory.total)
        ways = "; ".join(ways_out()) or "nothing that is planned here; take larger GPUs"
        raise RefusedInput(
            f"{what} does not fit: the least is {least.memory.total / GIB:.1f} GiB per GPU ({least.name}), a card "
            f"has {usable(card) / GIB:.1f} GiB to give. What would fit: {ways}"
        )
    roomy = [each for each in fitting if each.roomy]
    return min(roomy or fitting, key=lambda each: (each.seconds, each.memory.total))
