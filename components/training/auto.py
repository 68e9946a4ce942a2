"""`auto` in a stage's settings: ZeRO stage, row and checkpointing chosen by the arithmetic of `llava estimate`.

None of the three changes the result, so the fastest that fits the GPUs at hand is taken. Without a GPU there is
nothing to choose by, and a plain value stands in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from components.training.settings import AUTO, WITHOUT_GPU, TrainSettings
from llava import estimate
from llava.data.plan import Coverage
from llava.errors import RefusedInput
from llava.estimate import GIB, Choice, Corpus, Gpu, Setup
from llava.host_memory import host_memory
from llava.sizes import Sizes


def setup_of(settings: TrainSettings, parts: Sequence[str], gpus: int) -> Setup:
    """The part of the settings that memory and time depend on; what is `auto` keeps the arithmetic's defaults."""
    training = settings.training(parts)
    fixed = {name: getattr(settings, name) for name in WITHOUT_GPU if getattr(settings, name) != AUTO}
    return Setup(
        training,
        gpus,
        precision=settings.precision,
        lora_rank=settings.lora_rank if training == "lora" else 0,
        lora_dropout=settings.lora_dropout > 0,
        lora_bits=settings.lora_bits,
        tower="vision_tower" in parts,
        fused_loss=settings.fused_loss,
        offload=settings.offloads,
        **fixed,
    )


def candidates(
    sizes: Sizes, settings: TrainSettings, parts: Sequence[str], gpus: int, corpus: Corpus, card: Gpu
) -> list[Choice]:
    """Every way to run the stage that the settings leave open."""
    setup = setup_of(settings, parts, gpus)
    zero_stages = [1, 2, 3] if settings.compile is False else [1, 2]
    if setup.offload:
        zero_stages = [stage for stage in zero_stages if stage > 1]
    return list(
        estimate.choices(
            sizes,
            setup,
            corpus,
            card,
            settings.global_batch,
            settings.max_length,
            _tried(settings.zero_stage, zero_stages),
            _tried(settings.tokens_per_row, estimate.ROWS),
            _tried(settings.checkpointing, estimate.CHECKPOINTING),
        )
    )


def ways_out(
    stage: str,
    sizes: Sizes,
    settings: TrainSettings,
    parts: Sequence[str],
    gpus: int,
    corpus: Corpus,
    card: Gpu,
) -> Iterator[str]:
    """What would fit where the stage as it is set does not, with what it costs."""

    def best(changed: TrainSettings, count: int, on: Gpu = card) -> Choice | None:
        fitting = [each for each in candidates(sizes, changed, parts, count, corpus, on) if each.fits]
        return min(fitting, key=lambda each: each.seconds, default=None)

    free = settings.model_copy(update=dict.fromkeys(WITHOUT_GPU, AUTO))
    for changed, note in (
        (settings, ""),
        (free, f" with {stage}." + f"=auto, {stage}.".join(WITHOUT_GPU) + "=auto"),
    ):
        more = (count for count in _COUNTS if count > gpus and best(changed, count))
        if (count := next(more, None)) is not None:
            yield f"{count} of these cards{note}"
            break
    if settings.training(parts) == "full":
        for changes in _LIGHTER:
            if changes.keys() <= type(settings).model_fields.keys():
                lighter = free.model_copy(update=changes)
                fitting = [
                    each for each in candidates(sizes, lighter, parts, gpus, corpus, card) if each.fits
                ]
                if fitting:
                    named = " and ".join(f"{stage}.{key}={_written(value)}" for key, value in changes.items())
                    least = min(each.memory.total for each in fitting)
                    yield f"{named} (from {least / GIB:.1f} GiB per GPU, another recipe)"
    if not settings.offloads:
        offloading = free.model_copy(update={"offload": True})
        if found := best(offloading, gpus):
            host = host_memory(sizes, found.setup)
            without = found.seconds - estimate.offloaded_seconds(found.setup, sizes)
            yield (
                f"{stage}.offload=true ({found.memory.total / GIB:.1f} GiB per GPU, "
                f"{host.rank * gpus / GIB:.0f} GiB of host memory in all, an update takes "
                f"{found.seconds / without:.1f} times as long)"
            )
    larger = sorted(
        (gpu for gpu in estimate.GPUS.items() if gpu[1].memory_gib > card.memory_gib), key=_memory
    )
    if (name := next((name for name, gpu in larger if best(free, gpus, gpu)), None)) is not None:
        yield f"{gpus} x {name}"


_COUNTS = (2, 4, 8, 16, 32, 64)
_LIGHTER: tuple[dict[str, Any], ...] = ({"lora": True}, {"lora": True, "lora_bits": 4})


def _memory(gpu: tuple[str, Gpu]) -> int:
    return gpu[1].memory_gib


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tried(value: Any, known: Sequence[Any]) -> Sequence[Any]:
    return known if value == AUTO else [value]


def resolved(settings: TrainSettings, choice: Choice) -> TrainSettings:
    """The settings with what was chosen in the place of `auto`."""
    chosen = {name: getattr(choice.setup, name) for name in WITHOUT_GPU}
    return settings.model_copy(update=chosen)


def choose(
    stage: str,
    settings: TrainSettings,
    parts: Sequence[str],
    sizes: Sizes | None,
    coverage: Coverage,
    images: int,
) -> tuple[TrainSettings, str]:
    """Settings without `auto`, and what to say about it. `parts`: what learns, keys of `llava.model.PARTS`.

    `coverage` and `images` describe the data as it was measured; `sizes` is None for a model whose shapes are not
    known. Raises `RefusedInput` where nothing fits, or where there is no telling.
    """
    if AUTO not in (settings.zero_stage, settings.tokens_per_row, settings.checkpointing):
        return settings, ""
    if not settings.gpu:
        plain = {name: value for name, value in WITHOUT_GPU.items() if getattr(settings, name) == AUTO}
        return settings.model_copy(update=plain), "auto without a GPU: " + _told(plain)
    if sizes is None:
        raise RefusedInput(f"{stage}: auto knows no shapes of this model: set {', '.join(WITHOUT_GPU)}")
    card = gpu_at_hand(stage)
    corpus = Corpus(
        coverage.samples,
        (coverage.tokens - images * sizes.image_tokens) / coverage.samples,
        coverage.supervised / coverage.samples,
        images / coverage.samples,
        settings.epochs,
    )
    cards = f"GPUs of {card.memory_gib} GiB"
    found = candidates(sizes, settings, parts, settings.workers, corpus, card)
    if settings.min_workers is not None and settings.min_workers < settings.workers:
        # What is chosen now is kept when the group goes on with fewer, where each holds a larger share.
        fewest = candidates(sizes, settings, parts, settings.min_workers, corpus, card)
        estimate.choose(
            fewest,
            card,
            f"{stage} on min_workers={settings.min_workers} {cards}",
            lambda: list(ways_out(stage, sizes, settings, parts, settings.min_workers or 1, corpus, card)),
        )
        fitting = {_chosen(each) for each in fewest if each.fits}
        found = [each for each in found if _chosen(each) in fitting]
    choice = estimate.choose(
        found,
        card,
        f"{stage} on {settings.workers} {cards}",
        lambda: list(ways_out(stage, sizes, settings, parts, settings.workers, corpus, card)),
    )
    fit = f"{choice.memory.total / GIB:.0f} of {estimate.usable(card) / GIB:.0f} GiB per GPU"
    return resolved(settings, choice), f"auto: {choice.name} ({fit})"


def _chosen(choice: Choice) -> tuple[Any, ...]:
    return tuple(getattr(choice.setup, name) for name in WITHOUT_GPU)


def _told(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def gpu_at_hand(stage: str) -> Gpu:
    """What a GPU of the cluster is, asked on one; its memory is what its driver says."""
    import ray

    from components.training.utilisation import named

    name, memory = ray.get(ray.remote(num_gpus=1)(_properties).remote())
    known = named(name)
    if known is None:
        raise RefusedInput(f"{stage}: auto does not know the GPU {name!r}: set {', '.join(WITHOUT_GPU)}")
    return replace(known, memory_gib=round(memory / GIB))


def _properties() -> tuple[str, int]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory
