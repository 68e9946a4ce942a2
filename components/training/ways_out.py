"""What would fit where a training stage as it is set does not: with what it costs, and as it can be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from components.training.candidates import candidates
from components.training.settings import AUTO, WITHOUT_GPU, TrainSettings
from llava import estimate
from llava.errors import LlavaError
from llava.estimate import GIB, Choice, Corpus, Gpu
from llava.host_memory import host_memory
from llava.sizes import Sizes

_COUNTS = (2, 4, 8, 16, 32, 64)
_LIGHTER: tuple[dict[str, Any], ...] = ({"lora": True}, {"lora": True, "lora_bits": 4})
_FREE: dict[str, Any] = dict.fromkeys(WITHOUT_GPU, AUTO)


def ways_out(
    stage: str,
    sizes: Sizes,
    settings: TrainSettings,
    parts: Sequence[str],
    gpus: int,
    corpus: Corpus,
    card: Gpu,
) -> list[str]:
    """A text for each: more cards, adapters, an optimizer on the host, larger cards."""

    def fitting(changes: dict[str, Any], count: int = gpus, on: Gpu = card) -> tuple[list[Choice], str]:
        """Every choice that fits with these changes, and what else must be set for it."""
        for more in ({}, _FREE):
            if (changed := _changed(settings, changes | more)) is not None:
                found = [each for each in candidates(sizes, changed, parts, count, corpus, on) if each.fits]
                if found:
                    beside = [f"{stage}.{key}={AUTO}" for key in more if getattr(settings, key) != AUTO]
                    return found, f" with {', '.join(beside)}" if beside else ""
        return [], ""

    def ways() -> Iterator[str]:
        for count in _COUNTS:
            if count > gpus and (found := fitting({}, count))[0]:
                yield f"{count} of these cards{found[1]}"
                break
        for changes in _LIGHTER if settings.training(parts) == "full" else ():
            if changes.keys() <= type(settings).model_fields.keys():
                choices, beside = fitting(changes)
                if choices:
                    named = " and ".join(
                        f"{stage}.{key}={str(value).lower()}" for key, value in changes.items()
                    )
                    least = min(each.memory.total for each in choices)
                    yield f"{named}{beside} (from {least / GIB:.1f} GiB per GPU, another recipe)"
        if not settings.offloads:
            choices, beside = fitting({"offload": True})
            if choices:
                best = min(choices, key=lambda each: each.seconds)
                host = host_memory(sizes, best.setup)
                without = best.seconds - estimate.offloaded_seconds(best.setup, sizes)
                yield (
                    f"{stage}.offload=true{beside} ({best.memory.total / GIB:.1f} GiB per GPU, "
                    f"{host.rank * gpus / GIB:.0f} GiB of host memory in all, an update takes "
                    f"{best.seconds / without:.1f} times as long)"
                )
        larger = [item for item in estimate.GPUS.items() if item[1].memory_gib > card.memory_gib]
        for name, gpu in sorted(larger, key=lambda item: item[1].memory_gib):
            choices, beside = fitting({}, gpus, gpu)
            if choices:
                yield f"{gpus} x {name}{beside}"
                break

    return list(ways())


def _changed(settings: TrainSettings, changes: dict[str, Any]) -> TrainSettings | None:
    """The settings with `changes`, or None where they would be refused so."""
    try:
        return type(settings).model_validate(settings.model_dump(by_alias=True) | changes)
    except (ValidationError, LlavaError, ValueError):
        return None
