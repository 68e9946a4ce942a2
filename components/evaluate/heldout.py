"""The held-out questions of a dataset as an exam, with the right, a blank and a wrong picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contract import Folder
from components.evaluate.answering import BLANK, RIGHT, WRONG, Answer
from components.evaluate.exams import Exam
from components.evaluate.heldout_scores import Answered
from components.evaluate.settings import HELD_OUT_EXAM, EvaluateSettings
from components.scoring.base import Files
from components.scoring.benchmarks import find
from components.scoring.benchmarks.reading import Item
from components.scoring.benchmarks.vqa import is_match
from components.scoring.pictures import Picture
from components.scoring.questions import HeldOutQuestion, exam_digest, read_questions, wrong_pictures
from llava.data.jsonl import to_jsonl

_VERSION = "3"
"""How held-out questions are put and judged: raised where their scores compare no more with those before."""


@dataclass(frozen=True, kw_only=True)
class HeldOutExam(Exam):
    """The exam that every model sits, made from the dataset's own questions."""

    questions: Sequence[HeldOutQuestion]
    wrong: Sequence[HeldOutQuestion]
    """Of each question the one whose picture is shown as the wrong one."""
    skipped: Mapping[str, int]
    """Held-out rows that are no question, by reason."""


def open_heldout(dataset: Folder, settings: EvaluateSettings, local: Path) -> HeldOutExam:
    """The exam; `local`: an empty folder for its answers, which it makes."""
    local.mkdir(parents=True)
    questions, skipped = read_questions(dataset, settings.limit, settings.seed)
    others = wrong_pictures(questions, settings.seed)
    terms = {
        "benchmark": HELD_OUT_EXAM,
        "max_new_tokens": settings.max_new_tokens,
        "version": _VERSION,
    }
    wrong = [questions[other] for other in others]
    items = [
        Item(
            question.question,
            Picture(question.picture, question.image),
            {"question_id": question.id, "kind": question.kind},
            question.id,
            Picture(other.picture, other.image),
            question.expected,
        )
        for question, other in zip(questions, wrong, strict=True)
    ]
    return HeldOutExam(
        title=HELD_OUT_EXAM,
        benchmark=find(HELD_OUT_EXAM),
        items=items,
        files=Files(),
        digest=exam_digest(questions, others, terms),
        answer_length=settings.max_new_tokens,
        conditions=(RIGHT, BLANK, WRONG),
        local=local,
        folder="",
        own={},
        questions=questions,
        wrong=wrong,
        skipped=skipped,
    )


def rows_of(exam: HeldOutExam, answers: Sequence[Answer]) -> list[Answered]:
    """The lines of `answers.jsonl`: each question with its answers under all conditions."""
    return [
        Answered(
            id=question.id,
            kind=question.kind,
            question=question.question,
            expected=question.expected,
            wrong_image_of=other.id,
            answers=answer["answers"],
            correct={one: is_match(text, question.expected) for one, text in answer["answers"].items()},
            loss=answer["loss"],
            tokens=answer["tokens"],
        )
        for question, other, answer in zip(exam.questions, exam.wrong, answers, strict=True)
    ]


def write_rows(exam: HeldOutExam, rows: Sequence[Answered]) -> dict[str, Files]:
    """The files that are scored, by condition; the first of them holds everything and is the artifact's own."""
    found = {}
    for condition in exam.conditions:
        path = exam.local / ("answers.jsonl" if condition == RIGHT else f"{condition}.jsonl")
        told: Sequence[Any] = rows
        if condition != RIGHT:
            told = [row | {"answers": {RIGHT: row["answers"][condition]}} for row in rows]
        path.write_bytes(to_jsonl(told))
        found[condition] = Files(answers=path)
    return found
