"""Source `shapes`: the tiny world of `components/tiny_world.py`. A sample is described by its number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from components import tiny_world
from components.shard.source_settings import SourceSettings
from components.shard.sources.base import DataSource, Listing, Loaded, each
from llava.data.schema import Row


def listing(settings: SourceSettings) -> Listing:
    """The numbers of the scenes."""
    return Listing(range(settings.scenes))


def load(settings: SourceSettings, shared: None, item: int) -> Loaded:
    """Draw scene `item`; the scene itself says which split it belongs to."""
    scene = tiny_world.scene(settings.seed, item)
    row: Row = {
        "id": scene.id,
        "image": {"bytes": scene.png, "path": f"{scene.id}.png"},
        "width": scene.width,
        "height": scene.height,
        "captions": list(scene.captions),
        "objects": [{"category": category, "bbox": list(box)} for category, box in scene.objects],
    }
    return Loaded(scene.split, row)


def external(settings: SourceSettings) -> dict[str, str]:
    """Nothing enters from outside: the settings say it all."""
    return {}


def check(settings: SourceSettings) -> None:
    """Nothing can be missing."""


def made_of(settings: SourceSettings, shared: None, items: Sequence[int]) -> Iterable[object]:
    """The numbers; the settings say what is drawn."""
    return items


SOURCE = DataSource(
    external, check, listing, each(load), made_of, about="the tiny world, drawn here", needs={}
)
