"""Every way to run a training stage that its settings leave open, with what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.training.settings import AUTO, WITHOUT_GPU, TrainSettings
from llava import estimate
from llava.estimate import Choice, Corpus, Gpu, Setup
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


def _tried(value: Any, known: Sequence[Any]) -> Sequence[Any]:
    return known if value == AUTO else [value]
