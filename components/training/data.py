"""The data of a training stage: which datasets, how long their samples are, how they are opened.

Besides its input `dataset` a stage takes further ones by URI (`extra`), each with a weight. Lengths are measured once
per dataset, tokenizer, template and limit; they are found again under `lengths/` in the root, for any other run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from components.contract import (
    Artifact,
    Folder,
    Job,
    fingerprint,
    links_of,
    open_artifact,
    open_store,
    read_artifact,
    sha256_of,
)
from components.datasets.extra import look
from components.training.settings import Extra
from llava import conversation, templates, text_tokenizer
from llava.conversation import Encoder
from llava.data import plan, samples
from llava.data.plan import Coverage, SampleIndex, scan
from llava.data.reader import Mixture, ParquetRows
from llava.data.samples import VIEWS
from llava.errors import RefusedInput

MODEL, INDEX, HELD_OUT_INDEX = "model", "index.npz", "heldout.npz"
LENGTHS = "lengths"
_COVERAGE = "coverage.json"
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")


@dataclass(frozen=True)
class DatasetFiles:
    """One dataset's files of one split; it can be pickled."""

    folder: Folder
    digest: str
    keys: tuple[str, ...]
    weight: float = 1.0
    unread: str = ""
    """What lies beside them and is not read, in words."""

    def open(self, view: str) -> ParquetRows:
        """Its rows; RefusedInput where there are none or a column of the view is not what it must be."""
        filesystem, base = self.folder.arrow()
        return ParquetRows(filesystem, [f"{base}/{key}" for key in self.keys], VIEWS[view][1])


def source_of(dataset: Artifact, split: str = "train") -> DatasetFiles:
    """The files of one split of a dataset artifact."""
    return DatasetFiles(dataset.folder, dataset.digest, dataset.parquet(split))


def extra_sources(stage: str, extra: Sequence[Extra]) -> list[DatasetFiles]:
    """The training files of the further datasets of a stage; RefusedInput for one that is not there."""
    found = []
    for one in extra:
        files = look(one.uri, one.follow_links)
        if not files.keys:
            raise RefusedInput(
                f"{stage}.extra: {one.uri} holds no Parquet file for training, neither in train/ nor at its top"
                f"{files.unread}"
            )
        digest = files.artifact.digest if files.artifact else fingerprint(one.uri, links_of(one.follow_links))
        found.append(DatasetFiles(files.folder, digest, files.keys, one.weight, files.unread))
    return found


def external(stage: str, extra: Sequence[Extra]) -> dict[str, str]:
    """What further datasets add to the digest of an artifact; none adds nothing."""
    return {f"extra {number}": source.digest for number, source in enumerate(extra_sources(stage, extra))}


def check_extra(stage: str, extra: Sequence[Extra], view: str) -> None:
    """Refuse further datasets that are missing, changed or of another schema; needs nothing but their URIs."""
    for one, source in zip(extra, extra_sources(stage, extra), strict=True):
        try:
            if read_artifact(open_store(one.uri)):
                open_artifact(one.uri)
            source.open(view)
        except RefusedInput as error:
            raise RefusedInput(f"{stage}.extra: {error}") from None


def check(stage: str, settings: Any, dataset: Artifact, view: str) -> None:
    """Refuse, before workers start, what `check_extra` refuses and a held-out split that is missing."""
    check_extra(stage, settings.extra, view)
    check_heldout(stage, settings, dataset)


def check_heldout(stage: str, settings: Any, dataset: Artifact) -> None:
    """Refuse a held-out loss where no samples are held out."""
    if settings.eval_every and not source_of(dataset, "heldout").keys:
        raise RefusedInput(
            f"{stage}.eval_every={settings.eval_every}: dataset {dataset.uri} has no held-out samples; set it to 0"
        )


def open_all(sources: Sequence[DatasetFiles], view: str) -> Mixture:
    """All datasets as one."""
    return Mixture([(source.open(view), source.weight) for source in sources])


def measure(job: Job[Any], view: str) -> Coverage:
    """Every sample's length, kept in the artifact; fails where a dataset loses too many samples.

    With `eval_every` the held-out samples to look at are chosen too: `eval_samples` of them, the same every time.
    """
    lengths = _Lengths(job, view)
    dataset = job.inputs["dataset"]
    indices, coverage, starts = [], Coverage(), 0
    each: list[dict[str, Any]] = []
    for source in [source_of(dataset), *extra_sources(job.component, job.settings.extra)]:
        index, found = lengths.of(source)
        _enough(job, source, found)
        indices.append(replace(index, group=index.group + starts))
        starts += len(source.open(view).groups)
        coverage.add(found)
        each.append({"dataset": source.folder.uri, **found.as_json()})
        if job.settings.extra:
            job.say(f"{source.folder.uri}: {_told(found)}{source.unread}")
    _keep(job, SampleIndex.joined(indices), INDEX)
    if job.settings.eval_every:
        index, _ = lengths.of(source_of(dataset, "heldout"))
        if not len(index):
            raise RefusedInput(
                f"{job.component}.eval_every: no held-out sample of {dataset.uri} can be measured; set it to 0"
            )
        shuffled = np.random.Generator(np.random.Philox(key=job.settings.seed)).permutation(len(index))
        _keep(job, index.only(np.sort(shuffled[: job.settings.eval_samples])), HELD_OUT_INDEX)
    if job.settings.extra:
        job.notes["coverage_by_dataset"] = each
    job.say(_told(coverage))
    return coverage


def _told(coverage: Coverage) -> str:
    return (
        f"{coverage.samples:,} samples, {coverage.tokens:,} tokens, {coverage.supervised:,} supervised; "
        f"{coverage.truncated} truncated, {coverage.refused.total()} refused"
    )


def _keep(job: Job[Any], index: SampleIndex, name: str) -> None:
    index.save(job.scratch / name)
    job.folder.upload(job.scratch / name, name)


def _enough(job: Job[Any], source: DatasetFiles, coverage: Coverage) -> None:
    """Fail where too many samples of a dataset are lost or cut."""
    settings, where = job.settings, source.folder.uri
    if not coverage.samples or coverage.lost > settings.max_lost:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in coverage.refused.most_common())
        examples = "; ".join(found[0] for found in coverage.examples.values())
        raise RefusedInput(
            f"dataset {where}: {coverage.lost:.1%} of the samples cannot be trained on "
            f"({reasons or 'it holds no samples for this stage'}; {examples}); "
            f"the limit is {job.component}.max_lost={settings.max_lost:.1%}"
        )
    if coverage.truncated > settings.max_truncated * coverage.samples:
        raise RefusedInput(
            f"dataset {where}: {coverage.truncated / coverage.samples:.1%} of the samples are "
            f"longer than {job.component}.max_length={settings.max_length} and would lose their ends; "
            f"the limit is {job.component}.max_truncated={settings.max_truncated:.1%}"
        )


class _Lengths:
    """Measures datasets with a stage's encoder, or finds what an earlier run measured."""

    def __init__(self, job: Job[Any], view: str) -> None:
        model, settings = job.inputs["model"], job.settings
        from llava import model as models

        folder = model.local(MODEL)
        tokens = models.image_tokens(models.load_config(folder))
        tokenizer = models.load_processor(folder).tokenizer
        self._job, self._view = job, view
        self._encoder = Encoder(tokenizer, settings.template, tokens, settings.max_length)
        self._known = {
            "tokenizer": {
                file.path: file.sha256
                for file in model.manifest.files
                if Path(file.path).parent == Path(MODEL) and Path(file.path).name.startswith(_TOKENIZER)
            },
            "template": settings.template,
            "image_tokens": tokens,
            "max_length": settings.max_length,
            "view": view,
            # Whatever changes how samples are encoded changes their lengths.
            "code": [
                _source_digest(module) for module in (conversation, text_tokenizer, templates, samples, plan)
            ],
        }

    def of(self, source: DatasetFiles) -> tuple[SampleIndex, Coverage]:
        """Lengths and coverage of one dataset."""
        key = sha256_of({**self._known, "dataset": source.digest, "files": list(source.keys)})
        folder, local = self._job.workspace.store.sub(f"{LENGTHS}/{key[:16]}"), self._job.scratch / key[:16]
        if found := folder.fetch(_COVERAGE):
            folder.download(INDEX, local)
            return SampleIndex.load(local), Coverage.from_bytes(found[0])
        index, coverage = scan(source.open(self._view), self._view, self._encoder)
        index.save(local)
        folder.upload(local, INDEX)
        folder.write(_COVERAGE, coverage.to_bytes())
        return index, coverage


def _source_digest(module: Any) -> str:
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
