"""The table of sources: one line each."""

from components.shard.sources import coco, llava, shapes
from components.shard.sources.base import Source

SOURCES: dict[str, Source] = {
    "shapes": shapes.SOURCE,
    "coco": coco.SOURCE,
    "llava": llava.SOURCE,
}
