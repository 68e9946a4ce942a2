"""POPE: is there such a thing in the picture? Yes or no, on three ways to draw the things that are not there.

Labels are joined by (split, image, question text): ids restart in every split, and later label files have other rows.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from components.scoring.base import (
    Files,
    MissingFile,
    Record,
    Scored,
    Unit,
    first_line,
    get,
    read_rows,
    table,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.reading import Item, Paper, from_questions
from components.scoring.bootstrap import Floats
from llava.errors import RefusedInput

Key = tuple[str, str, str]
"""(split, image, question text)."""
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_NO = frozenset(["no", "not"])


def parse(answer: str) -> str | None:
    """`no` where the first sentence holds the word no or not, else `yes`; None for an answer without a word.

    That is POPE's own rule: a sentence that affirms without saying yes ("There is a dog.") counts as yes.
    """
    words = _first_words(answer)
    if not words:
        return None
    return "no" if _NO & words else "yes"


def score(files: Files) -> Scored:
    """Per split accuracy, precision, recall, F1 and share of yes, and the mean F1; in percent.

    Precision is undefined where nothing was answered with yes, recall where nothing is yes.
    """
    answers_path = files.need("answers", "the answers JSONL (question_id, prompt, text)")
    questions_path = files.need("questions", "the question file (question_id, image, text, category)")
    if not files.labels or "" in files.labels:
        raise MissingFile(
            "labels", files.called("labels"), "a file for each split, each with its split's name"
        )
    questions = read_rows(questions_path)
    keys = [_key(row, questions_path) for row in questions]
    labels = {split: _labels(split, path, keys, questions_path) for split, path in files.labels.items()}
    without = Counter(split for split, _, _ in keys if split not in labels)
    if without:
        said = ", ".join(f"{count:,} of {split}" for split, count in sorted(without.items()))
        raise RefusedInput(
            f"{questions_path}: questions without a label file: {said}; "
            f"give one for each split: {files.called('labels')}"
        )
    answers = _join_answers(questions, keys, answers_path, questions_path)
    units, columns = [], []
    seen: Counter[Key] = Counter()
    for key, answer in zip(keys, answers, strict=True):
        seen[key] += 1
        label, given = labels[key[0]][key], parse(answer)
        right = given == label
        units.append(
            Unit((*key, label, seen[key]), key[2], label, answer, float(right), key[1], int(given is None))
        )
        columns.append((label == "yes", given == "yes", right and label == "yes", right))
    flags = np.array(columns, dtype=np.float64)
    splits = sorted(labels)
    inside = [np.array([key[0] == split for key in keys], dtype=np.float64) for split in splits]
    sums = table([column for mask in inside for column in (mask, *(flags.T * mask))])

    def formula(sums: Floats) -> dict[str, Floats]:
        scores: dict[str, Floats] = {}
        for index, split in enumerate(splits):
            n, positive, said_yes, true_yes, right = np.moveaxis(sums[..., 5 * index : 5 * index + 5], -1, 0)
            scores[f"{split}/accuracy"] = 100 * right / n
            scores[f"{split}/precision"] = 100 * true_yes / said_yes
            scores[f"{split}/recall"] = 100 * true_yes / positive
            scores[f"{split}/f1"] = 100 * 2 * true_yes / (said_yes + positive)
            scores[f"{split}/yes_ratio"] = 100 * said_yes / n
        f1 = [scores[f"{split}/f1"] for split in splits]
        return scores | {"mean_f1": sum(f1[1:], f1[0]) / len(f1)}

    failed = sum(unit.failed for unit in units)
    unsaid = sum(parse(answer) == "yes" and "yes" not in _first_words(answer) for answer in answers)
    remarks = []
    if failed:
        remarks.append(f"{failed:,} answers hold no word: they are wrong and neither yes nor no")
    if unsaid:
        remarks.append(f"{unsaid:,} answers say neither yes nor no nor not, and count as yes (POPE's rule)")
    return Scored("pope", units, sums, formula, len(units), remarks)


def prompt(row: Record) -> str:
    """The question, and the wish for yes or no."""
    return f"{row['text']}\nReply with yes or no."


def _key(row: Record, path: Path) -> Key:
    return (
        str(get(row, "category", path)),
        str(get(row, "image", path)),
        _asked(text_of(row, path)),
    )


def _asked(text: str) -> str:
    """The question alone, without the wish for a short answer that files add to it."""
    line = first_line(text)
    return line[: line.index("?") + 1] if "?" in line else line


def _labels(split: str, path: Path, keys: list[Key], questions_path: Path) -> dict[Key, str]:
    """The label of every question of `split`; refuses label rows that do not match the questions one to one."""
    found: dict[Key, list[str]] = defaultdict(list)
    for row in read_rows(path):
        label = text_of(row, path, "label").strip().lower()
        if label not in ("yes", "no"):
            raise RefusedInput(f"{path}: label {label!r} of {row.get('text')!r} is neither yes nor no")
        found[split, str(get(row, "image", path)), _asked(text_of(row, path))].append(label)
    asked = Counter(key for key in keys if key[0] == split)
    faults = {
        f"of {asked.total():,} questions have no label": (asked - _sizes(found)).total(),
        f"of {_sizes(found).total():,} label rows belong to no question or are doubled": (
            _sizes(found) - asked
        ).total(),
        "questions have two labels that differ": sum(len(set(labels)) > 1 for labels in found.values()),
    }
    said = [f"{count:,} {fault}" for fault, count in faults.items() if count]
    if said:
        raise RefusedInput(
            f"{path}: does not match split {split!r} of {questions_path}: {'; '.join(said)}. Rows are joined by split, "
            "image and question text: give the label file that these questions were made from"
        )
    return {key: labels[0] for key, labels in found.items()}


def _sizes(found: Mapping[Key, list[str]]) -> Counter[Key]:
    return Counter({key: len(labels) for key, labels in found.items()})


def _join_answers(questions: list[Record], keys: list[Key], path: Path, questions_path: Path) -> list[str]:
    """The answer to each question: by id, and by prompt, split and image where an id is not unique."""
    waiting: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, (row, key) in enumerate(zip(questions, keys, strict=True)):
        waiting[str(get(row, "question_id", questions_path)), key[2]].append(index)
    given: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for row in read_rows(path):
        given[str(get(row, "question_id", path)), _asked(text_of(row, path, "prompt"))].append(row)
    answers: list[str | None] = [None] * len(questions)
    faults: Counter[str] = Counter()
    for name, rows in given.items():
        indices = waiting.get(name, [])
        if len(rows) != len(indices):
            faults["answers belong to no question, or to one that is answered already"] += max(
                0, len(rows) - len(indices)
            )
            continue
        for index, found in _assign(rows, indices, keys, path):
            if found is None:
                faults["answers could be to several questions: ids and prompts repeat, and metadata names no "
                       "`category` and `image`"] += 1  # fmt: skip
            else:
                answers[index] = text_of(found, path)
    short = sum(max(0, len(indices) - len(given.get(name, []))) for name, indices in waiting.items())
    if short:
        faults[f"of {len(questions):,} questions have no answer"] = short
    said = [f"{count:,} {fault}" for fault, count in faults.items() if count]
    if said:
        raise RefusedInput(
            f"{path}: does not match {questions_path}: {'; '.join(said)}. Nothing is scored: an answer is joined by "
            "question_id and prompt"
        )
    return [answer for answer in answers if answer is not None]


def _assign(
    rows: list[Record], indices: list[int], keys: list[Key], path: Path
) -> list[tuple[int, Record | None]]:
    """Which of the questions at `indices`, alike in id and text, each row answers; None where that is open."""
    if len({parse(text_of(row, path)) for row in rows}) == 1:
        return list(zip(indices, rows, strict=True))
    left, assigned = list(rows), []
    for index in indices:
        split, image, _ = keys[index]
        fits = [row for row in left if _told(row, "category", split) and _told(row, "image", image)]
        if len(fits) == 1:
            left.remove(fits[0])
        assigned.append((index, fits[0] if len(fits) == 1 else None))
    return assigned


def _told(row: Record, name: str, value: str) -> bool:
    """Whether the row does not contradict that its question's `name` is `value`."""
    told = (row.get("metadata") or {}).get(name, row.get(name))
    return told is None or str(told) == value


def _first_words(answer: str) -> set[str]:
    return set(_WORD.findall(re.split(r"[.\n]", answer.strip(), maxsplit=1)[0].lower()))


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """The question file; an id is used again in each split, so a picture is what names a question."""
    items = from_questions(paper, prompt, unit=lambda row: str(row.get("image")))
    return items, paper.files(questions=paper.copies["questions"], labels=paper.labels)


BENCHMARK = Benchmark(
    name="pope",
    reads={"answers": "JSONL", "questions": "JSONL", "labels": "SPLIT=JSONL for each split"},
    score=score,
    prompt=prompt,
    headline="mean_f1",
    gather=gather,
    needs=[["questions", "labels"]],
    by_split=True,
    answer_length=16,
    right_or_wrong=True,
    unit_name=lambda unit: str(unit.image),
    units_in_order=True,
)
