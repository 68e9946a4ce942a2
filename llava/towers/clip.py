"""CLIP's vision tower (arXiv 2103.00020): a CLS position, and a norm before the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llava.towers.base import TowerFamily, VisionSizes, shapes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ClipSizes(VisionSizes):
    """The shapes of a CLIP."""

    gate: ClassVar[int] = 1
    before_patches: ClassVar[int] = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """A config that is silent means ViT-B/32."""
        return cls(**shapes(config, patch=32))

    @property
    def parameters(self) -> int:
        """A CLS embedding, no bias of the patches; a norm before the layers and one after."""
        return self.layers * self.layer_parameters + self.embeddings + self.hidden + 2 * self.norm


def classes() -> tuple[Any, Any]:
    """Of a whole CLIP the vision half is read."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionConfig, CLIPVisionModel


def states(tower: Any, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    """See `TowerFamily.states`."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    yield hidden
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
        yield hidden


FAMILY = TowerFamily(ClipSizes, classes, states, hub_prefix="vision_model.")
