"""The table of sources: one line each."""

from collections.abc import Iterator, Sequence
from typing import Any

from components.contract.store import Store
from components.shard.source_settings import SourceSettings
from components.shard.sources import cc3m, coco, llava, parquet, shapes, webdataset
from components.shard.sources.base import DataSource, Outcome
from components.shard.sources.texts import checked

SOURCES: dict[str, DataSource] = {
    "shapes": shapes.SOURCE,
    "coco": coco.SOURCE,
    "llava": llava.SOURCE,
    "cc3m": cc3m.SOURCE,
    "webdataset": webdataset.SOURCE,
    "parquet": parquet.SOURCE,
}


def outcomes(settings: SourceSettings, shared: Any, items: Sequence[Any], kept: Store) -> Iterator[Outcome]:
    """One outcome for each sample of the items: a row whose texts can be kept, or why there is none."""
    for outcome in SOURCES[settings.source].rows(settings, shared, items, kept):
        yield checked(settings, outcome)
