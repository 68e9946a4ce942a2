"""What a finished evaluation found, scored again from its own files, and two of them made comparable."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic

from components.contract import Artifact
from components.scoring.benchmarks import Files, Scored, Unit, find
from components.scoring.paired import OtherQuestions
from llava.errors import RefusedInput

CONTAMINATION = "contamination.json"


class FilesNote(pydantic.BaseModel):
    """What `files_note` writes."""

    answers: str | None
    questions: str | None
    labels: dict[str, str]
    splits: str | None
    split: str
    reviews: list[str]
    max_failed: float


class ExamNote(pydantic.BaseModel):
    """What a manifest says of one exam, as far as it is read again."""

    benchmark: str
    digest: str
    folder: str = ""
    scores: dict[str, float | None] = {}
    files: FilesNote | None = None
    excluded: bool = False


class _Named(pydantic.BaseModel):
    """The questions of each exam that are left out."""

    questions: dict[str, list[str]]


def outcomes(evaluation: Artifact, names: Collection[str] | None = None) -> dict[str, Scored]:
    """Each benchmark of `names` (None: all) that has scores, by name, as the evaluation reported it."""
    return {
        name: without(scored, excluded(evaluation, name))
        for name, scored in _every(evaluation, names).items()
    }


def comparable(
    base: Artifact, new: Artifact, names: Iterable[str]
) -> tuple[dict[str, Scored], dict[str, Scored]]:
    """Both outcomes on the same questions: without those that either leaves out because it was trained on them.

    Raises `OtherQuestions` where a benchmark is missing in `base`, or was asked with other pictures, words or limits.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        ours, theirs = exams_of(base).get(name), exams_of(new).get(name)
        if not ours or not ours.scores:
            raise OtherQuestions(f"{name}: {base.uri} did not measure it")
        if not theirs or not theirs.scores:
            raise RefusedInput(
                f"{name}: {new.uri} did not measure it; known: {', '.join(exams_of(new)) or 'none'}"
            )
        if ours.digest != theirs.digest:
            raise OtherQuestions(
                f"{name}: the two answered other questions, or were judged otherwise ({ours.digest[:12]}, "
                f"{theirs.digest[:12]}); evaluate both on the same"
            )
    left_out = {name: excluded(base, name) | excluded(new, name) for name in names}
    first, second = (
        {name: without(scored, left_out[name]) for name, scored in _every(each, names).items()}
        for each in (base, new)
    )
    return first, second


def excluded(evaluation: Artifact, name: str) -> set[str]:
    """The questions of benchmark `name` that its scores leave out, as `unit_name` names them."""
    if not exams_of(evaluation)[name].excluded:
        return set()
    try:
        found = _Named.model_validate_json(evaluation.read(CONTAMINATION))
    except pydantic.ValidationError:
        raise RefusedInput(
            f"{evaluation.uri}: its {CONTAMINATION} is damaged; evaluate the model again"
        ) from None
    return set(found.questions.get(name, ()))


def without(scored: Scored, names: Collection[str]) -> Scored:
    """The outcome over the questions that are not among `names`; what only all of them have (`extra`) is dropped."""
    kept = [
        index for index, unit in enumerate(scored.units) if unit_name(scored.benchmark, unit) not in names
    ]
    if len(kept) == len(scored.units):
        return scored
    units, gone = [scored.units[index] for index in kept], len(scored.units) - len(kept)
    before = f"counted with the {gone:,} of {len(scored.units):,} that are left out"
    remarks = [f"{remark} ({before})" for remark in scored.remarks]
    return replace(scored, units=units, sums=scored.sums[kept], n=len(kept), remarks=remarks, extra={})


def unit_name(benchmark: str, unit: Unit) -> str:
    """What the benchmark knows a unit by."""
    return find(benchmark).unit_name(unit)


def files_note(files: Files) -> dict[str, Any]:
    """`files`, which lie in one folder, as JSON."""
    return {
        "answers": _name(files.answers),
        "questions": _name(files.questions),
        "labels": {split: path.name for split, path in files.labels.items()},
        "splits": _name(files.splits),
        "split": files.split,
        "reviews": [path.name for path in files.reviews],
        "max_failed": files.max_failed,
    }


def files_of(note: FilesNote, folder: Path) -> Files:
    """What `files_note` wrote, in `folder`."""

    def inside(name: str) -> Path:
        if name in ("", "..") or name != Path(name).name:
            raise RefusedInput(
                f"{folder}: its manifest names the file {name!r}, which must lie in it: it is damaged"
            )
        return folder / name

    def path(name: str | None) -> Path | None:
        return None if name is None else inside(name)

    return Files(
        answers=path(note.answers),
        questions=path(note.questions),
        labels={split: inside(name) for split, name in note.labels.items()},
        splits=path(note.splits),
        split=note.split,
        reviews=[inside(name) for name in note.reviews],
        max_failed=note.max_failed,
    )


def _every(evaluation: Artifact, names: Collection[str] | None) -> dict[str, Scored]:
    """The outcomes over all questions."""
    return {
        name: find(exam.benchmark).score(files_of(exam.files, _local(evaluation, exam)))
        for name, exam in exams_of(evaluation).items()
        if exam.scores and exam.files and (names is None or name in names)
    }


def exams_of(evaluation: Artifact) -> dict[str, ExamNote]:
    """What the evaluation's manifest says of each exam, by title."""
    found: dict[str, ExamNote] | None = evaluation.note("exams", dict[str, ExamNote] | None)
    return found or {}


def _local(evaluation: Artifact, exam: ExamNote) -> Path:
    return evaluation.local(exam.folder)


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name
