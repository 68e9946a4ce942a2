"""Short answers: exact match, and VQA's soft accuracy where ten people answered.

Labels: VQA's annotations JSON, JSONL or JSON rows with `question_id` and `answer` or `answers`, any LLaVA-format
JSON (each question's own answer), or the `answers.jsonl` of `llava evaluate`, which carries its labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.scoring.base import (
    Files,
    Record,
    Scored,
    Unit,
    by_id,
    first_line,
    get,
    read_json,
    read_rows,
    same_rows,
    table,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.reading import (
    Item,
    Paper,
    dataset,
    from_conversations,
    from_dataset,
    from_questions,
)
from components.scoring.bootstrap import Floats
from components.scoring.pictures import Picture
from components.scoring.questions import read_questions
from llava.errors import RefusedInput

PEOPLE = 10
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


@dataclass(frozen=True)
class Label:
    """What was asked about which picture, and what people answered."""

    question: str
    answers: tuple[str, ...]
    majority: str
    """The answer that exact match compares with."""
    image: str | None = None


def normalise(answer: str) -> str:
    """VQA's rule: lower case, no punctuation, no articles, numbers up to ten as digits, apostrophes dropped.

    A mark becomes a blank, or nothing where it (or a comma between digits) shows that it joins no words.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = _DIGITS_COMMA.search(text) is not None
    for mark in _MARKS:
        text = text.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    words = _FULL_STOP.sub("", text).lower().replace("'", "").split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def is_match(answer: str, expected: str) -> bool:
    """Exact match after `normalise` on both sides; an empty answer is never right."""
    return bool(answer.strip()) and normalise(answer) == normalise(expected)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over the ten ways to leave one person out of min(1, those of the other nine who agree / 3)."""
    given = normalise(answer)
    agree = sum(normalise(one) == given for one in people)
    return (agree * min(1.0, (agree - 1) / 3) + (len(people) - agree) * min(1.0, agree / 3)) / len(people)


def score(files: Files) -> Scored:
    """`exact_match`, and `soft_accuracy` where every question has ten answers; in percent."""
    path = files.need("answers", "the answers JSONL (question_id, text)")
    rows = read_rows(path)
    if not files.labels and not files.questions and rows and "expected" in rows[0]:
        labels = {str(row["id"]): _own_label(row, path) for row in rows}
        given = {str(row["id"]): str(row["answers"]["right_image"]) for row in rows}
        same_rows(labels, [str(row["id"]) for row in rows], str(path), "answers", "questions")
    else:
        labels = read_labels(files.truth("the right answers (docs/evaluation.md lists the formats)"))
        same_rows(
            labels, [str(get(row, "question_id", path)) for row in rows], str(path), "answers", "questions"
        )
        given = {id_: text_of(row, path) for id_, row in by_id(rows, path).items()}
    ten = {len(label.answers) == PEOPLE for label in labels.values()}
    if ten == {True, False}:
        raise RefusedInput(
            f"{path}: some questions have {PEOPLE} answers and some have not; score them apart"
        )
    units, exact, soft = [], [], []
    for id_, label in labels.items():
        answer = given[id_]
        exact.append(float(is_match(answer, label.majority)))
        soft.append(soft_accuracy(answer, label.answers) if ten == {True} and answer.strip() else 0.0)
        units.append(
            Unit((id_, label.question, *label.answers), label.question, label.majority, answer,
                 soft[-1] if ten == {True} else exact[-1], label.image, int(not answer.strip()))
        )  # fmt: skip
    failed = sum(unit.failed for unit in units)

    def formula(sums: Floats) -> dict[str, Floats]:
        n = sums[..., 0]
        soft_percent = 100 * sums[..., 2] / n if ten == {True} else np.full_like(n, np.nan)
        return {"exact_match": 100 * sums[..., 1] / n, "soft_accuracy": soft_percent}

    remarks = [f"{failed:,} answers are empty and count as wrong"] if failed else []
    return Scored("vqa", units, table([np.ones(len(units)), exact, soft]), formula, len(units), remarks)


def prompt(row: Record) -> str:
    """The question, and the wish for a short answer."""
    return f"{row['text']}\nReply with one word or a short phrase."


def read_labels(path: Path) -> dict[str, Label]:
    """Labels by question id, from any of the formats in the module's docstring."""
    value: Any = read_json(path) if path.suffix == ".json" else read_rows(path)
    if isinstance(value, dict):
        value = value.get("annotations", value.get("data"))
    if not isinstance(value, list) or not value:
        raise RefusedInput(f"{path}: no list of labels; docs/evaluation.md names the formats")
    if "conversations" in value[0]:
        return _llava_labels(value, path)
    return {id_: _label(row, path) for id_, row in by_id(value, path).items()}


def _label(row: Record, path: Path) -> Label:
    answers = row.get("answers", row.get("answer", row.get("label")))
    if answers is None or answers == []:
        raise RefusedInput(f"{path}: question {row['question_id']} has neither `answers` nor `answer`")
    many = answers if isinstance(answers, list) else [answers]
    texts = tuple(str(one["answer"] if isinstance(one, dict) else one) for one in many)
    image = row.get("image", row.get("image_id"))
    question = first_line(str(row.get("question", row.get("text", ""))))
    return Label(question, texts, str(row.get("multiple_choice_answer") or _majority(texts)),
                 None if image is None else str(image))  # fmt: skip


def _majority(answers: tuple[str, ...]) -> str:
    common = Counter(normalise(answer) for answer in answers).most_common(1)[0][0]
    return next(answer for answer in answers if normalise(answer) == common)


def _own_label(row: Record, path: Path) -> Label:
    expected = str(get(row, "expected", path))
    return Label(str(row.get("question", "")), (expected,), expected)


def _llava_labels(samples: list[Record], path: Path) -> dict[str, Label]:
    """Each question and answer of a conversation; with several, the id is `ID-1`, `ID-2`, ..."""
    labels: dict[str, Label] = {}
    for id_, sample in by_id(samples, path, key="id").items():
        turns = sample["conversations"]
        pairs = list(zip(turns[::2], turns[1::2], strict=False))
        roles = [turn.get("from") for turn in turns]
        if not pairs or roles != ["human", "gpt"] * len(pairs):
            raise RefusedInput(f"{path}: sample {id_} is no dialogue of human and gpt in turn: {roles}")
        for number, (asked, answered) in enumerate(pairs, 1):
            name = id_ if len(pairs) == 1 else f"{id_}-{number}"
            if name in labels:
                raise RefusedInput(f"{path}: two questions have the id {name}; rename a sample")
            text = str(answered["value"])
            labels[name] = Label(first_line(str(asked["value"])), (text,), text, sample.get("image"))
    return labels


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """A dataset's held-out questions, a LLaVA-format file, or questions with their labels."""
    uri = paper.settings.data
    if uri is None:
        return from_questions(paper, prompt), paper.files(labels=paper.labels)
    if (artifact := dataset(uri)) is not None:
        asked = [
            (question.id, question.question, question.expected, Picture(question.picture, question.image))
            for question in read_questions(artifact, None, 0)[0]
        ]
        items, labels = from_dataset(paper, uri, asked)
    else:
        items, labels = from_conversations(paper, uri)
    return items, paper.files(labels={"": labels})


BENCHMARK = Benchmark(
    name="vqa",
    reads={
        "answers": "JSONL",
        "labels": "VQA annotations, rows or LLaVA-format JSON",
        "questions": "the same",
    },
    score=score,
    prompt=prompt,
    headline="exact_match",
    gather=gather,
    needs=[["data"], ["questions", "labels"]],
    answer_length=16,
    right_or_wrong=True,
)
