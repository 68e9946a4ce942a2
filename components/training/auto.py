"""`auto` in a stage's settings: ZeRO stage, row and checkpointing chosen by the arithmetic of `llava estimate`.

None of the three changes the result, so the fastest that fits the GPUs at hand is taken. Without a GPU there is
nothing to choose by, and a plain value stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from components.training.candidates import candidates
from components.training.settings import AUTO, WITHOUT_GPU, TrainSettings
from components.training.ways_out import ways_out
from llava import estimate
from llava.data.plan import Coverage
from llava.errors import RefusedInput
from llava.estimate import GIB, Choice, Corpus, Gpu
from llava.sizes import Sizes


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
            lambda: ways_out(stage, sizes, settings, parts, settings.min_workers or 1, corpus, card),
        )
        fitting = {_chosen(each) for each in fewest if each.fits}
        found = [each for each in found if _chosen(each) in fitting]
    choice = estimate.choose(
        found,
        card,
        f"{stage} on {settings.workers} {cards}",
        lambda: ways_out(stage, sizes, settings, parts, settings.workers, corpus, card),
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
