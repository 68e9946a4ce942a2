"""The component `shard`: list a source's samples, one Ray task per shard, a dataset of Parquet files at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from components.contract.component import Component, Job
from components.contract.manifest import Artifact
from components.shard.report import report
from components.shard.settings import ShardSettings
from components.shard.sources import SOURCES, outcomes
from components.shard.sources.base import Loaded, RefusedSample
from components.shard_results import Refusals, note_refused
from components.shard_tasks import ShardOutput, ShardTask, run_shards
from llava.data.schema import images_of
from llava.errors import RefusedInput


class Shard(Component):
    """Makes `train/part-*.parquet` and `heldout/part-*.parquet`; see `llava/data/schema.py` for the rows."""

    name: ClassVar[str] = "shard"
    version: ClassVar[str] = "2"
    Settings: ClassVar[type[ShardSettings]] = ShardSettings

    def check(self, settings: ShardSettings, inputs: dict[str, Artifact]) -> None:
        """Refuse a data folder whose files are not found."""
        SOURCES[settings.source].check(settings)

    def external(self, settings: ShardSettings) -> dict[str, str]:
        """The fingerprint of the data folder."""
        return SOURCES[settings.source].external(settings)

    def run(self, job: Job) -> None:
        """List, cut into shards of `rows_per_shard`, run the tasks, report."""
        settings: ShardSettings = job.settings
        listing = SOURCES[settings.source].listing(settings)
        if not len(listing.items):
            raise RefusedInput(f"shard.source={settings.source}: {settings.path} lists no samples")
        tasks = [
            ShardTask(f"part-{part:05d}", part, samples, _write_shard, (settings, listing.place, items))
            for part, (items, samples) in enumerate(listing.shards(settings.rows_per_shard))
        ]
        # Where the number of samples is a guess, their share can be judged at the end only.
        limit = settings.max_bad if listing.exact else 1.0
        refusals = Refusals(sum(task.samples for task in tasks), limit, "shard.max_bad")
        result = run_shards(job, tasks, group=settings.group, workers=settings.workers, refusals=refusals)
        Refusals(result.samples, settings.max_bad, "shard.max_bad").check(result)
        result.counts.update(listing.counts)
        note_refused(job, result)
        report(job, result)


def _write_shard(output: ShardOutput, arguments: tuple[ShardSettings, Any, Sequence[Any]]) -> None:
    settings, place, items = arguments
    for outcome in outcomes(settings, place, items, output.kept):
        if isinstance(outcome, RefusedSample):
            output.refuse(outcome.name, outcome.reason, str(outcome))
        else:
            output.write(outcome.split, outcome.row)
            _measure(output, outcome)


def _measure(output: ShardOutput, loaded: Loaded) -> None:
    row = loaded.row
    for name in loaded.counts:
        output.count(name)
    if row.get("image"):
        output.measure("image width, px", row["width"])
        output.measure("image height, px", row["height"])
    for image in (images := images_of(row)):
        output.measure("image file, bytes", len(image["bytes"]))
    output.measure("images", len(images))
    for caption in row.get("captions", []):
        output.measure("caption, words", len(caption.split()))
    if turns := row.get("conversations"):
        output.measure("conversation, turns", len(turns))
    objects = row.get("objects")
    if objects is None:
        output.count("objects/photos with unknown objects")
        return
    output.measure("objects in a photo", len(objects))
    for one in objects:
        output.count(f"category/{one['category']}")
