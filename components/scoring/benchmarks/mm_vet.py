"""MM-Vet: open questions, each graded from 0 to 1 by a judge; the score is the mean grade, in percent.

Grades are stored ones: MM-Vet's grade file (by question id, lists of `content` and `score`, one per run). The table
`mm-vet.json` says which capabilities a question needs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.scoring.base import (
    Files,
    MissingFile,
    Record,
    Scored,
    Unit,
    number_of,
    read_object,
    refuse_failures,
    same_rows,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.reading import Item, Paper, answer_row
from components.scoring.bootstrap import Floats, point
from llava.errors import RefusedInput

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_GRADE = re.compile(r"([01](?:\.\d+)?|\.\d+)(?:[\s,;].*)?", re.DOTALL)


def parse(content: Any) -> float | None:
    """The grade with which the judge's text begins, 0 to 1; None where there is none."""
    found = _GRADE.fullmatch(str(content).strip()) if isinstance(content, str) else None
    grade = float(found[1]) if found else math.nan
    return grade if 0 <= grade <= 1 else None


def score(files: Files) -> Scored:
    """`total` and each capability in percent, the mean over the judge's runs."""
    truth_path = files.truth("mm-vet.json (question, answer, capability by id)")
    truth = read_object(truth_path)
    path = files.answers if not files.reviews else files.reviews[0]
    if path is None or len(files.reviews) > 1:
        raise MissingFile("reviews", files.called("reviews"), "one grade file of MM-Vet (it holds all runs)")
    grades = read_object(path)
    same_rows(truth, grades, str(path), "grades", "questions")
    answers = read_object(files.answers) if files.reviews and files.answers else {}
    if answers:
        same_rows(truth, answers, str(files.answers), "answer", "questions")
    remarks: list[str] = []
    read = {id_: _grades(id_, grades[id_], path, remarks) for id_ in truth}
    runs = max(len(given) for given in read.values())
    failed = sum(runs - sum(grade is not None for grade in given) for given in read.values())
    if failed:
        remarks.append(f"{failed:,} of {runs * len(truth):,} grades failed and are left out")
    refuse_failures(failed, runs * len(truth), files, str(path))
    names = ("total", *CAPABILITIES)
    sums, units = [], []
    for id_, row in truth.items():
        needs = row.get("capability") or []
        unknown = set(needs) - set(CAPABILITIES)
        if unknown or not needs:
            raise RefusedInput(f"{truth_path}: question {id_} needs {sorted(unknown) or 'no'} capability; known: "
                               f"{', '.join(CAPABILITIES)}")  # fmt: skip
        inside = np.array([name in ("total", *needs) for name in names], dtype=np.float64)
        padded = read[id_] + [None] * (runs - len(read[id_]))
        judged = np.array([grade is not None for grade in padded], dtype=np.float64)
        marks = np.array([grade or 0.0 for grade in padded])
        sums.append(np.stack([np.outer(judged, inside), np.outer(marks, inside)], axis=-1).ravel())
        given = [grade for grade in padded if grade is not None]
        units.append(
            Unit((id_, str(row.get("question", "")), str(row.get("answer", ""))), str(row.get("question", "")),
                 str(row.get("answer", "")), str(answers.get(id_, "")),
                 float(np.mean(given)) if given else math.nan, row.get("imagename"), runs - len(given))
        )  # fmt: skip

    def every(sums: Floats) -> dict[str, Floats]:
        parts = sums.reshape(*sums.shape[:-1], runs, len(names), 2)
        percent = 100 * parts[..., 1] / parts[..., 0]
        return {
            f"{run}/{name}": percent[..., run, index]
            for run in range(runs)
            for index, name in enumerate(names)
        }

    def formula(sums: Floats) -> dict[str, Floats]:
        parts = every(sums)
        return {name: np.mean([parts[f"{run}/{name}"] for run in range(runs)], axis=0) for name in names}

    array = np.array(sums)
    extra: dict[str, Any] = {}
    if runs > 1:
        by_run = point(array, every)
        extra["runs"] = [{name: by_run[f"{run}/{name}"] for name in names} for run in range(runs)]
        extra["spread"] = {
            name: float(np.std([one[name] for one in extra["runs"]], ddof=1)) for name in names
        }
    return Scored("mm-vet", units, array, formula, len(truth), remarks, extra)


def prompt(row: Record) -> str:
    """The question as it stands: long answers are wanted."""
    return str(row["question"])


def _grades(id_: str, row: Record, path: Path, remarks: list[str]) -> list[float | None]:
    """One grade per run; the judge's text decides where it is stored, the stored score where it is not."""
    if not isinstance(row, dict) or ("score" not in row and "content" not in row):
        raise RefusedInput(f"{path}: {id_} holds no grades (`score` or `content`); give MM-Vet's grade file")
    scores, contents = _list(row.get("score")), _list(row.get("content"))
    grades: list[float | None] = []
    for run in range(max(len(scores), len(contents))):
        stored = number_of(scores[run]) if run < len(scores) else math.nan
        usable = stored if 0 <= stored <= 1 else None
        if run >= len(contents):
            grades.append(usable)
            continue
        grade = parse(contents[run])
        if run < len(scores) and grade != usable:
            remarks.append(f"{path}: {id_}, run {run + 1}: {scores[run]} is stored, its text says "
                           f"{'nothing' if grade is None else grade}, which counts")  # fmt: skip
        grades.append(grade)
    return grades


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """The questions of mm-vet.json with their pictures."""
    path = paper.copies["labels"]
    pictures = paper.pictures(str(paper.settings.labels))
    items = []
    for id_, row in read_object(path).items():
        text, name = text_of(row, path, "question"), row.get("imagename")
        items.append(Item(paper.put(text, prompt(row)), pictures(name), answer_row(id_, name), id_))
    return items, paper.files(labels={"": path}, max_failed=paper.settings.max_failed)


def write(items: Sequence[Item], rows: Sequence[Record]) -> tuple[str, str]:
    """The answers by question id, as MM-Vet's evaluator takes them."""
    answers = {row["question_id"]: row["text"] for row in rows}
    return ".json", json.dumps(answers, ensure_ascii=False, indent=1) + "\n"


def unscored(files: Files) -> str | None:
    """MM-Vet's own grader gives the grades; answers alone have no score."""
    return None if files.reviews else "MM-Vet's grader has not graded them"


BENCHMARK = Benchmark(
    name="mm-vet",
    reads={
        "reviews": "MM-Vet's grade JSON (or as answers)",
        "labels": "mm-vet.json",
        "questions": "the same",
        "answers": "JSON",
        "max_failed": "a share",
    },
    score=score,
    prompt=prompt,
    headline="total",
    gather=gather,
    needs=[["labels"]],
    answer_length=512,
    write=write,
    unscored=unscored,
)
