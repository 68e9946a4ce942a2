"""The component `filter`: a dataset's captions, chosen so that frequent concepts do not drown rare ones.

Pass 1 counts the noun phrases of every file, pass 2 looks up which rows hold which of the phrases that count; both
are Ray tasks, a file each, and share what spaCy found. The choice is made on numbers by the driver (`choice.py`).
The chosen rows become new files: of CC3M that is a fifth, and training then reads no picture that it does not use; a
list of row numbers over the old files would have it read all of them. Held-out rows are copied as they are, so that
scores stay comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.contract.component import Component, Job
from components.contract.manifest import Artifact, FileEntry
from components.contract.store import Folder
from components.datasets.reading import count_of, opened, require_dataset, rows_of
from components.datasets.results import Refusals, ShardResult
from components.datasets.tasks import ShardOutput, ShardTask, run_shards
from components.filter.choice import Counts, Postings, by_rarity, choose, count, joined, look_up
from components.filter.phrases import CACHE, Phrases, model_version, reader
from components.filter.report import PhraseChoice, report
from components.filter.settings import FilterSettings
from components.ray_cluster.spread import spread
from llava.errors import RefusedInput

DATASET = "dataset"


class Filter(Component):
    """Takes `dataset` and makes a dataset of some of its training rows, as they are, in their order."""

    name: ClassVar[str] = "filter"
    version: ClassVar[str] = "1"
    Settings: ClassVar[type[FilterSettings]] = FilterSettings
    takes = MappingProxyType({DATASET: "captions"})
    gives = ("captions",)

    def check(self, settings: FilterSettings, inputs: dict[str, Artifact]) -> None:
        """Refuse an input that is no dataset."""
        if DATASET not in inputs:
            raise RefusedInput(f"filter needs the input {DATASET!r}, an artifact of shard")
        require_dataset(inputs[DATASET])

    def external(self, settings: FilterSettings) -> dict[str, str]:
        """The pipeline that finds the phrases, by its version."""
        return {"model": model_version(settings.model)}

    def run(self, job: Job[FilterSettings]) -> None:
        """Count, choose, write."""
        settings: FilterSettings = job.settings
        dataset = job.inputs[DATASET]
        files = _files(dataset, "train")
        source = reader(settings, dataset.folder, job.workspace.store.sub(CACHE))
        counts = Counts()
        for _, found in spread(job, "reading phrases", _count, source, files, settings.workers):
            counts.add(found)
        phrases = by_rarity(counts.total())
        kept = phrases.filter(pc.greater_equal(phrases["rows"], settings.min_count))
        if not kept.num_rows:
            raise RefusedInput(
                f"filter.min_count={settings.min_count}: none of the {phrases.num_rows:,} noun phrases in "
                f"{dataset.uri} has as many captions; set it lower"
            )
        vocabulary = kept["phrase"].combine_chunks()
        found_in: list[Any] = [None] * len(files)
        looking = spread(job, "choosing", _look_up, (source, vocabulary), files, settings.workers)
        for number, postings in looking:
            found_in[number] = postings
        postings = joined(found_in)
        sizes = [len(one.keys) for one in found_in]
        del found_in
        rows = choose(postings, vocabulary, settings.cap, settings.count_chosen, settings.seed)
        result = _write(job, files, sizes, np.flatnonzero(rows))
        report(job, result, PhraseChoice(phrases, kept, postings, rows))


def _files(dataset: Artifact, split: str) -> list[FileEntry]:
    wanted = set(dataset.parquet(split))
    return [file for file in dataset.manifest.files if file.path in wanted]


def _count(source: Phrases, file: FileEntry) -> pa.Table:
    return count(source.table(file))


def _look_up(shared: tuple[Phrases, pa.Array], file: FileEntry) -> Postings:
    source, vocabulary = shared
    return look_up(source.table(file), vocabulary)


def _write(
    job: Job[FilterSettings], files: Sequence[FileEntry], sizes: Sequence[int], chosen: np.ndarray
) -> ShardResult:
    """The chosen rows, by their numbers over all files, and the held-out rows, as new files."""
    settings, dataset = job.settings, job.inputs[DATASET]
    starts = np.cumsum([0, *sizes])
    tasks = []
    for part, start in enumerate(range(0, len(chosen), settings.rows_per_shard)):
        numbers = chosen[start : start + settings.rows_per_shard]
        places = np.searchsorted(starts, numbers, side="right") - 1
        picked = [
            (files[place].path, (numbers[places == place] - starts[place]).tolist())
            for place in np.unique(places)
        ]
        arguments = (dataset.folder, picked)
        tasks.append(ShardTask(f"train-{part:05d}", part, len(numbers), _write_chosen, arguments))
    for part, file in enumerate(_files(dataset, "heldout")):
        rows = count_of(dataset.folder, file.path)
        tasks.append(ShardTask(f"heldout-{part:05d}", part, rows, _copy_heldout, (dataset.folder, file.path)))
    # Nothing is refused here: what is not chosen is counted by the report.
    refusals = Refusals(sum(task.samples for task in tasks), 0.0, "filter")
    return run_shards(job, tasks, group=settings.group, workers=settings.workers, refusals=refusals)


def _write_chosen(output: ShardOutput, arguments: tuple[Folder, Sequence[tuple[str, list[int]]]]) -> None:
    folder, picked = arguments
    for key, numbers in picked:
        wanted, start = np.array(numbers), 0
        with opened(folder, key) as file:
            for group, count in enumerate(file.groups):
                inside = wanted[(wanted >= start) & (wanted < start + count)] - start
                start += count
                if len(inside):
                    for row in file.table(group).take(inside).to_pylist():
                        output.write("train", row)


def _copy_heldout(output: ShardOutput, arguments: tuple[Folder, str]) -> None:
    for row in rows_of(*arguments):
        output.write("heldout", row)
