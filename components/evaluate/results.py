"""What came of an exam: its scores under each condition, and what manifest, MLflow and people are told of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.contract import Job
from components.evaluate import exams
from components.evaluate.answering import RIGHT, Answer
from components.evaluate.exams import Exam
from components.evaluate.heldout import HeldOutExam, rows_of, write_rows
from components.evaluate.heldout_scores import Answered, metrics
from components.evaluate.judge_run import reviewed
from components.evaluate.report import Sample
from components.evaluate.settings import EvaluateSettings
from components.scoring import bootstrap
from components.scoring.base import Files, Scored, Unit
from components.scoring.outcomes import files_note, without
from llava.errors import RefusedInput


@dataclass(frozen=True)
class Result:
    """One exam with its outcomes."""

    exam: Exam
    note: dict[str, Any]
    """What the manifest keeps: `notes["exams"][title]`."""
    outcomes: Mapping[str, Scored]
    """By condition, without the questions that are left out; empty where there is no score yet."""
    metrics: dict[str, float]
    remarks: list[str]
    samples: list[Sample]
    heldout: list[Answered] = field(default_factory=list)
    """Of the held-out questions: the answered rows that count."""


def result_of(
    job: Job[EvaluateSettings], exam: Exam, answers: Sequence[Answer], left_out: Collection[str]
) -> Result:
    """Write the answers files, score them as `llava score` does, and keep them in the artifact."""
    if isinstance(exam, HeldOutExam):
        return _of_heldout(job, exam, answers, left_out)
    files = {
        condition: exams.answered(
            exam,
            [answer["answers"][condition] for answer in answers],
            job.inputs["model"].digest[:16],
            "" if condition == RIGHT else f"{condition.partition('_')[0]}-",
        )
        for condition in exam.conditions
    }
    if exam.settings is not None and exam.settings.judge is not None:
        files[RIGHT] = reviewed(job, exam, files[RIGHT])
    note: dict[str, Any] = _note(exam)
    remarks: list[str] = []
    every: dict[str, Scored] = {}
    for condition, one in files.items():
        if (why := exam.benchmark.unscored(one)) is None:
            every[condition] = exams.score(exam, one)
        elif condition == RIGHT:
            note |= {"n": len(exam.items), "scores": {}}
            remarks.append(f"{exam.title}: answered and not scored, since {why}; see `llava score`")
    clean = {condition: _clean(exam, scored, left_out) for condition, scored in every.items()}
    told: dict[str, float] = {}
    for condition, scored in clean.items():
        told |= _scores(exam.title if condition == RIGHT else f"{exam.title}/{condition}", scored)
    if RIGHT in clean:
        note |= _scored_note(files[RIGHT], clean[RIGHT], bool(left_out))
        remarks += [f"{exam.title}: {remark}" for remark in clean[RIGHT].remarks]
        told[f"eval/{_metric(exam.title)}/questions/n"] = float(clean[RIGHT].n)
        told[f"eval/{_metric(exam.title)}/questions/failed"] = float(clean[RIGHT].failed)
    for path in sorted(path for path in exam.local.rglob("*") if path.is_file()):
        job.folder.upload(path, f"{exam.folder}/{path.relative_to(exam.local).as_posix()}")
    marked = {condition: exams.units(exam, scored) for condition, scored in every.items()}
    return Result(exam, note, clean, told, remarks, _samples(exam, answers, marked))


def _of_heldout(
    job: Job[EvaluateSettings], exam: HeldOutExam, answers: Sequence[Answer], left_out: Collection[str]
) -> Result:
    rows = rows_of(exam, answers)
    kept = [row for row in rows if row["id"] not in left_out]
    if not kept:
        raise RefusedInput(
            f"every held-out picture of {job.inputs['questions'].uri} is in the training data: nothing is left"
        )
    files = write_rows(exam, rows)
    answers_file = files[RIGHT].need("answers", "the answers")
    job.folder.upload(answers_file, answers_file.name)
    clean = {one: _clean(exam, exams.score(exam, each), left_out) for one, each in files.items()}
    told = metrics(kept, exam.title)
    if "eval/loss" not in told:
        job.say("the model's chat template is none of ours: held-out loss is not measured")
    by_kind: dict[str, list[Sample]] = {}
    for number, row in enumerate(rows):
        given = {one: (row["answers"][one], row["correct"][one]) for one in exam.conditions}
        by_kind.setdefault(row["kind"], []).append(
            Sample(row["kind"], row["question"], row["expected"], given, (exam.title, number))
        )
    samples = [sample for kind in sorted(by_kind) for sample in by_kind[kind]]
    remarks = [f"{exam.title}: {remark}" for remark in clean[RIGHT].remarks]
    note = _note(exam) | _scored_note(files[RIGHT], clean[RIGHT], bool(left_out))
    return Result(exam, note, clean, told, remarks, samples, kept)


def _note(exam: Exam) -> dict[str, Any]:
    return {"benchmark": exam.benchmark.name, "digest": exam.digest, "folder": exam.folder}


def _scored_note(files: Files, scored: Scored, excluded: bool) -> dict[str, Any]:
    intervals = bootstrap.intervals(scored.sums, scored.formula)
    return {
        "files": files_note(files),
        "n": scored.n,
        "failed": scored.failed,
        "scores": {key: _finite(value) for key, value in scored.scores.items()},
        "intervals": {key: [_finite(end) for end in ends] for key, ends in intervals.items()},
        "remarks": list(scored.remarks),
        "excluded": excluded,
    }


def _clean(exam: Exam, scored: Scored, left_out: Collection[str]) -> Scored:
    """Without the questions that are left out."""
    clean = without(scored, left_out)
    if not clean.units:
        raise RefusedInput(f"{exam.title}: every picture is in the training data: nothing is left to score")
    return clean


def _scores(name: str, scored: Scored) -> dict[str, float]:
    named = {f"eval/{_metric(name)}/{_metric(key)}": value for key, value in scored.scores.items()}
    return {key: value for key, value in named.items() if math.isfinite(value)}


def _samples(exam: Exam, answers: Sequence[Answer], judged: Mapping[str, Sequence[Unit]]) -> list[Sample]:
    """Answers as their scores judged them: `judged` are the units by condition."""
    samples = []
    for number, (item, answer) in enumerate(zip(exam.items, answers, strict=True)):
        units = {condition: each[number] for condition, each in judged.items()}
        given = {
            one: (text, units[one].value >= 0.5 if one in units and exam.benchmark.right_or_wrong else None)
            for one, text in answer["answers"].items()
        }
        expected = units[RIGHT].expected if RIGHT in units else ""
        samples.append(Sample(exam.title, item.prompt, expected, given, (exam.title, number)))
    return samples


def _metric(name: str) -> str:
    """MLflow takes only these characters in a metric's name."""
    return re.sub(r"[^\w.\-/ ]", "_", name)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
