"""The table of vision tower families: one line each (docs/extending.md)."""

from llava.errors import RefusedInput
from llava.towers import clip, siglip
from llava.towers.base import TowerFamily

FAMILIES: dict[str, TowerFamily] = {
    "clip": clip.FAMILY,
    "siglip": siglip.FAMILY,
}
"""By the `model_type` of the tower's config.json, without its `_vision_model`."""


def family_of(model_type: object) -> TowerFamily:
    """The family of a tower with this `model_type`. Raises `RefusedInput`."""
    name = str(model_type).removesuffix("_vision_model")
    if name not in FAMILIES:
        raise RefusedInput(f"vision tower of type {model_type!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
