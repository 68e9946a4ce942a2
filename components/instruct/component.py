"""The component `instruct`: one Ray task per training shard of a dataset, and one for the held-out questions.

The teacher is `rules` (embedded) or `llm` (behind an endpoint; the package `llm`). Held-out questions are always asked
by the rules: their answers are short, certain and can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from components.contract.component import Component, Job, refusals
from components.contract.manifest import Artifact
from components.contract.store import Folder
from components.contract.workspace import Workspace
from components.datasets.reading import count_of, require_dataset, rows_of
from components.datasets.results import Refusals, note_refused
from components.datasets.tasks import ShardOutput, ShardTask, run_shards
from components.instruct.llm.checks import VERSION, language_is_known
from components.instruct.llm.endpoint import read_key
from components.instruct.llm.prompts import load_prompts
from components.instruct.llm.stage import answered_tasks, try_endpoint
from components.instruct.report import report
from components.instruct.samples import heldout_row, measure, questions, samples, spread_over_kinds
from components.instruct.settings import InstructSettings
from llava.data.schema import TEXT_COLUMNS, Row
from llava.errors import RefusedInput

DATASET = "dataset"


class Instruct(Component):
    """Takes `dataset` (of `shard`) and makes a dataset of conversations with the same split."""

    name: ClassVar[str] = "instruct"
    version: ClassVar[str] = "2"
    Settings: ClassVar[type[InstructSettings]] = InstructSettings
    takes = MappingProxyType({DATASET: "dataset"})
    gives = ("conversations",)
    # It joins the cluster itself, after an endpoint was tried.
    on_ray = False

    def preflight(self, settings: InstructSettings, workspace: Workspace) -> list[str]:
        """What a teacher behind an endpoint cannot do without, the endpoint itself among it."""
        if settings.teacher != "llm":
            return []
        found = refusals(
            lambda: load_prompts(settings.prompts),
            lambda: read_key(settings),
            lambda: _known_language(settings),
        )
        return found or refusals(lambda: try_endpoint(settings, workspace))

    def check(self, settings: InstructSettings, inputs: dict[str, Artifact]) -> None:
        """Refuse an input that is no dataset, and what a teacher behind an endpoint cannot do without."""
        if DATASET not in inputs:
            raise RefusedInput(f"instruct needs the input {DATASET!r}, an artifact of shard")
        require_dataset(inputs[DATASET])
        if settings.teacher == "llm":
            read_key(settings)
            _known_language(settings)

    def external(self, settings: InstructSettings) -> dict[str, str]:
        """The prompts, by their contents, and which checks the answers have to pass."""
        if settings.teacher != "llm":
            return {}
        return {"prompts": load_prompts(settings.prompts).digest, "checks": VERSION}

    def run(self, job: Job[InstructSettings]) -> None:
        """One task for each training file, one for all held-out files together, then the report."""
        settings: InstructSettings = job.settings
        dataset = job.inputs[DATASET]
        train, heldout = dataset.parquet("train"), dataset.parquet("heldout")
        counts = [_count(dataset.folder, [key]) for key in train]
        if settings.teacher == "llm":
            tasks = answered_tasks(job, dataset.folder, train, counts)
        else:
            job.workspace.cluster()
            tasks = [
                ShardTask(f"train-{part:05d}", part, count, _write_training, (settings, dataset.folder, key))
                for part, (key, count) in enumerate(zip(train, counts, strict=True))
            ]
        # The choice of held-out questions is even over the kinds of all of them: one task sees them all. It
        # reads texts only, and the pictures of what it chose.
        if heldout and settings.heldout_questions:
            count = _count(dataset.folder, heldout)
            arguments = (settings, dataset.folder, heldout)
            tasks.append(ShardTask("heldout", 0, count, _write_heldout, arguments))
        refusals = Refusals(sum(task.samples for task in tasks), settings.max_bad, "instruct.max_bad")
        result = run_shards(job, tasks, group=settings.group, workers=settings.workers, refusals=refusals)
        note_refused(job, result)
        report(job, result)


def _known_language(settings: InstructSettings) -> None:
    if not language_is_known(settings.language):
        raise RefusedInput(f"instruct.language={settings.language}: give an ISO 639 code such as en or de")


def _count(folder: Folder, keys: Sequence[str]) -> int:
    return sum(count_of(folder, key) for key in keys)


def _rows(folder: Folder, keys: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[Row]:
    for key in keys:
        yield from rows_of(folder, key, columns)


def _write_training(output: ShardOutput, arguments: tuple[InstructSettings, Folder, str]) -> None:
    settings, folder, key = arguments
    for row in _rows(folder, [key]):
        written = 0
        for sample in samples(row, settings):
            output.write("train", sample)
            measure(output, "train", sample)
            written += 1
        if not written:
            output.refuse(row["id"], "nothing-to-say", _knowledge(row))
        output.count(f"samples of a photo/{written}")


def _write_heldout(output: ShardOutput, arguments: tuple[InstructSettings, Folder, Sequence[str]]) -> None:
    settings, folder, keys = arguments
    candidates = []
    for photo, row in enumerate(_rows(folder, keys, TEXT_COLUMNS)):
        found = questions(row, photo, settings)
        output.count(
            "heldout questions/photos asked about" if found else "heldout questions/photos without any"
        )
        candidates += found
    chosen = spread_over_kinds(candidates, settings.heldout_questions, settings.seed)
    output.count("heldout questions/possible", len(candidates))
    output.count("heldout questions/chosen", len(chosen))
    by_photo: dict[int, list[Any]] = {}
    for question in chosen:
        by_photo.setdefault(question.photo, []).append(question)
    for photo, row in enumerate(_rows(folder, keys)):
        for question in by_photo.get(photo, ()):
            sample = heldout_row(row, question)
            output.write("heldout", sample)
            measure(output, "heldout", sample)


def _knowledge(row: Row) -> str:
    objects = "unknown objects" if row["objects"] is None else f"{len(row['objects'])} objects"
    return f"{len(row['captions'])} captions, {objects}"
