"""SigLIP's vision tower (arXiv 2303.15343): no CLS position; LLaVA never reads the attention pool at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from llava.towers.base import TowerFamily, VisionSizes, shapes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SiglipSizes(VisionSizes):
    """The shapes of a SigLIP."""

    head: bool = True
    """Whether the tower ends in its attention pool."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """A config that is silent means the base model at 224 px."""
        return cls(**shapes(config, patch=16), head=bool(config.get("vision_use_head", True)))

    @property
    def parameters(self) -> int:
        """A bias of the patches; a norm after the layers; the pool."""
        return self.layers * self.layer_parameters + self.embeddings + self.hidden + self.unread

    @property
    def unread(self) -> int:
        """A norm, and the pool."""
        d, f = self.hidden, self.intermediate
        pool = d + (4 * d**2 + 4 * d) + self.norm + (2 * d * f + f + d) if self.head else 0
        return self.norm + pool


def classes() -> tuple[Any, Any]:
    """Of a whole SigLIP the vision half is read."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionConfig, SiglipVisionModel


def states(tower: Any, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    """See `TowerFamily.states`."""
    hidden = tower.embeddings(pixel_values)
    yield hidden
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
        yield hidden


FAMILY = TowerFamily(SiglipSizes, classes, states, hub_prefix="vision_model.")
