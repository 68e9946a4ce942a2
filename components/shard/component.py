"""The component `shard`: list a source's samples, one Ray task per shard, a dataset of Parquet files at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import NonNegativeInt

from components.contract.component import Component, Job, recipe, refusals
from components.contract.digest import canonical_json, sha256_of
from components.contract.manifest import Artifact
from components.contract.printable import printable
from components.contract.store import Refusal
from components.contract.workspace import Workspace
from components.datasets.results import IDS_IN_NOTES, Refusals, RefusedNote, note_refused
from components.datasets.tasks import ShardOutput, ShardTask, run_shards
from components.shard.report import report
from components.shard.settings import ShardSettings
from components.shard.sources import SOURCES, outcomes
from components.shard.sources.base import Loaded, RefusedSample, left_out
from components.shard.sources.photos import refused_files
from llava.data.schema import images_of
from llava.errors import RefusedInput

_PARTITION = {
    "scenes", "rows_per_shard", "captions", "instances", "conversations", "images", "files"
}  # fmt: skip
"""What says which samples there are and where they are cut, and does not change the bytes of a given run of them."""


class Shard(Component):
    """Makes `train/part-*.parquet` and `heldout/part-*.parquet`; see `llava/data/schema.py` for the rows."""

    name: ClassVar[str] = "shard"
    version: ClassVar[str] = "4"
    Settings: ClassVar[type[ShardSettings]] = ShardSettings
    gives = ("dataset", "captions")

    def preflight(self, settings: ShardSettings, workspace: Workspace) -> list[str]:
        """A data folder, or a file of it, that is not there."""
        return refusals(lambda: self.check(settings, {}))

    def check(self, settings: ShardSettings, inputs: dict[str, Artifact]) -> None:
        """Refuse a data folder whose files are not found."""
        SOURCES[settings.source].check(settings)

    def external(self, settings: ShardSettings) -> dict[str, str]:
        """The fingerprint of the data folder."""
        return SOURCES[settings.source].external(settings)

    def check_found(self, settings: ShardSettings, artifact: Artifact) -> None:
        """Refuse a dataset that was made under a larger `max_bad` and needed it."""
        refused = artifact.note("refused", dict[str, RefusedNote])
        reasons = {reason: one.count for reason, one in refused.items()}
        bad = sum(reasons.values())
        samples = bad + sum(artifact.note("rows", dict[str, NonNegativeInt]).values())
        if bad > settings.max_bad * samples:
            told = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
            raise RefusedInput(
                f"{artifact.uri}: finished with {bad:,} of {samples:,} samples refused, limit "
                f"shard.max_bad={settings.max_bad:g}: {told}. Mend the source, or raise shard.max_bad"
            )

    def run(self, job: Job[ShardSettings]) -> None:
        """List, cut into shards of `rows_per_shard`, run the tasks, report."""
        settings: ShardSettings = job.settings
        files = refused_files(settings)
        listing = SOURCES[settings.source].listing(settings)
        if not len(listing.items):
            raise RefusedInput(
                f"shard.source={settings.source}: {settings.path} lists no samples{left_out(files)}"
            )
        tasks = [
            ShardTask(
                f"part-{part:05d}", part, samples, _write_shard, (settings, listing.shared, items), _made_of
            )
            for part, (items, samples) in enumerate(listing.shards(settings.rows_per_shard))
        ]
        # Where the number of samples is a guess, their share can be judged at the end only.
        limit = settings.max_bad if listing.exact else 1.0
        limits = Refusals(sum(task.samples for task in tasks), limit, "shard.max_bad")
        result = run_shards(job, tasks, group=settings.group, workers=settings.workers, refusals=limits)
        result.refused += [_as_sample(one) for one in listing.refused]
        Refusals(result.samples, settings.max_bad, "shard.max_bad").check(result)
        result.counts.update(listing.counts)
        result.counts.update(f"files-left-out/{one.reason}" for one in files)
        note_refused(job, result)
        if files:
            job.notes["files_left_out"] = [
                f"{one.reason}: {printable(one.text)}" for one in files[:IDS_IN_NOTES]
            ]
            job.say(f"not everything in {settings.path} is read{left_out(files)}")
        job.notes["dataset_digest"] = sha256_of(sorted((one["path"], one["sha256"]) for one in result.files))
        job.notes["shards"] = {"made": len(tasks) - result.reused, "copied": result.reused}
        if result.reused:
            job.say(f"{result.reused:,} of {len(tasks):,} shards copied from earlier datasets of this root")
        report(job, result)


def _as_sample(file: Refusal) -> dict[str, str]:
    refused = RefusedSample(file.key, file.reason, file.text)
    return {"id": refused.name, "reason": refused.reason, "detail": str(refused)}


def _made_of(arguments: tuple[ShardSettings, Any, Sequence[Any]]) -> str:
    """Hex sha256 of the component's version, of the recipe for a row and of what each row is made of."""
    settings, shared, items = arguments
    rows = {name: value for name, value in recipe(settings).items() if name not in _PARTITION}
    digest = hashlib.sha256(canonical_json([Shard.name, Shard.version, rows]))
    for one in SOURCES[settings.source].made_of(settings, shared, items):
        told = repr(one).encode()
        digest.update(len(told).to_bytes(8, "little") + told)
    return digest.hexdigest()


def _write_shard(output: ShardOutput, arguments: tuple[ShardSettings, Any, Sequence[Any]]) -> None:
    settings, shared, items = arguments
    for outcome in outcomes(settings, shared, items, output.kept):
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
