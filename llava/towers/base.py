"""What a family of vision towers is: what differs between CLIP, SigLIP and others, and nothing else.

Nothing is imported that needs a device, so that `llava.sizes` can plan where there is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VisionSizes(ABC):
    """The shapes of a vision tower, and what follows from them by arithmetic."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image: int
    """Side of the picture in pixels."""
    patch: int
    """Side of a patch in pixels."""

    gate: ClassVar[int] = 0
    """1 where the activation multiplies by a gate of its own (QuickGELU), which the backward pass needs, too."""
    before_patches: ClassVar[int] = 0
    """Positions that belong to no patch and stand before them: 0, or 1 for a CLS. A stock LLaVA can drop one."""

    @classmethod
    @abstractmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From the tower's own part of a `config.json`, with the family's defaults."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """All of them, as transformers counts."""

    @property
    def patches(self) -> int:
        """Patches of one picture."""
        return (self.image // self.patch) ** 2

    @property
    def positions(self) -> int:
        """Positions inside the tower."""
        return self.patches + self.before_patches

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that multiply each position."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Of one layer: its weights, their biases, and two layer norms."""
        return self.layer_weights + 4 * self.hidden + self.intermediate + self.hidden + 2 * self.norm

    @property
    def unread(self) -> int:
        """Parameters outside the layers that no hidden state depends on: the norm behind them."""
        return self.norm

    def parameters_up_to(self, layer: int) -> int:
        """Of the embeddings and the first `layer` layers: what a hidden state depends on."""
        return self.parameters - self.unread - (self.layers - layer) * self.layer_parameters

    @property
    def norm(self) -> int:
        """Parameters of a layer norm."""
        return 2 * self.hidden

    @property
    def embeddings(self) -> int:
        """The patches' matrix, and an embedding of every position."""
        return 3 * self.patch**2 * self.hidden + self.positions * self.hidden


def shapes(config: Mapping[str, Any], patch: int) -> dict[str, int]:
    """The fields of `VisionSizes` under their usual names in a config; where it is silent, a ViT-B at 224 px."""
    usual = {
        "hidden": ("hidden_size", 768),
        "intermediate": ("intermediate_size", 3072),
        "layers": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 12),
        "image": ("image_size", 224),
        "patch": ("patch_size", patch),
    }
    return {field: int(config.get(name, default)) for field, (name, default) in usual.items()}


@dataclass(frozen=True)
class TowerFamily:
    """Three things that the model, the arithmetic and `backbones` ask of a family."""

    sizes: type[VisionSizes]
    classes: Callable[[], tuple[Any, Any]]
    """The config class and the model class of transformers, imported when they are asked for."""
    states: Callable[[Any, torch.Tensor], Iterator[torch.Tensor]]
    """(tower, (N, 3, H, W)) -> one after the other the stock tower's hidden states, (N, positions, D) each: first
    what goes into the layers, then what each of them gives. What is not asked for is not computed."""
    hub_prefix: str = ""
    """What the names of its weights begin with on the hub, where current transformers leaves that out."""

    @property
    def before_patches(self) -> int:
        """Positions before the patches: 0 or 1."""
        return self.sizes.before_patches
