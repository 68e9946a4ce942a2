"""MME: two yes/no questions per picture in fourteen subtasks; each is worth up to 200 points, no percent.

A subtask's points are 100 x the share of right answers + 100 x the share of pictures with both right.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.scoring.base import (
    Files,
    Record,
    Scored,
    Unit,
    first_line,
    get,
    read_rows,
    read_text,
    same_rows,
    text_of,
    texts_in,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.reading import Item, Paper, from_questions
from components.scoring.bootstrap import Floats
from llava.errors import RefusedInput

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
PER_PICTURE = 2
_LOOKED_AT = 4
"""Letters of an answer in which MME's own tool looks for yes or no."""

Key = tuple[str, str, str]
"""(subtask, picture without its ending, question)."""


@dataclass(frozen=True)
class Reply:
    """What is right and what was given."""

    truth: str
    answer: str


def parse(answer: str) -> str | None:
    """`yes` or `no`, where it begins the answer; None otherwise."""
    start = answer.strip().lower()[:_LOOKED_AT]
    return "yes" if "yes" in start else "no" if "no" in start else None


def score(files: Files) -> Scored:
    """`perception`, `cognition` and each subtask, in points; a subtask that is not there is undefined."""
    path = files.need("answers", "MME's result files (SUBTASK.txt or their folder) or an answers JSONL")
    replies = _result_files(path) if path.is_dir() or path.suffix == ".txt" else _joined(path, files)
    pictures: dict[tuple[str, str], list[tuple[str, Reply]]] = defaultdict(list)
    for (subtask, picture, question), reply in replies.items():
        pictures[subtask, picture].append((question, reply))
    odd = [f"{task}/{picture}" for (task, picture), asked in pictures.items() if len(asked) != PER_PICTURE]
    if odd:
        raise RefusedInput(
            f"{path}: {len(odd):,} of {len(pictures):,} pictures have not {PER_PICTURE} questions (first: {odd[0]}); "
            "nothing is scored: a picture counts when both its answers are right"
        )
    units, sums = [], []
    for (subtask, picture), asked in sorted(pictures.items()):
        given = [parse(reply.answer) for _, reply in asked]
        right = sum(said == reply.truth for said, (_, reply) in zip(given, asked, strict=True))
        inside = np.array([subtask == name for name in SUBTASKS], dtype=np.float64)
        sums.append(
            np.concatenate([inside * PER_PICTURE, inside * right, inside, inside * (right == PER_PICTURE)])
        )
        asked.sort(key=lambda pair: pair[0])
        expected = " / ".join(reply.truth for _, reply in asked)
        units.append(
            Unit((subtask, picture, *(question for question, _ in asked), expected),
                 " / ".join(question for question, _ in asked), expected,
                 " / ".join(reply.answer for _, reply in asked), float(right), picture, given.count(None))
        )  # fmt: skip
    failed = sum(unit.failed for unit in units)
    remarks = [f"{failed:,} answers begin with neither yes nor no and count as wrong"] if failed else []
    there = {subtask for subtask, _ in pictures}
    absent = [name for name in SUBTASKS if name not in there]
    if absent:
        remarks.append(f"{len(absent)} of {len(SUBTASKS)} subtasks are not there: {', '.join(absent)}; the sums are "
                       "over the others")  # fmt: skip

    def formula(sums: Floats) -> dict[str, Floats]:
        asked, right, images, both = np.split(sums, 4, axis=-1)
        points = 100 * right / asked + 100 * both / images
        scores = {name: points[..., index] for index, name in enumerate(SUBTASKS)}
        for group, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
            present = [scores[name] for name in names if name in there]
            scores[group] = np.sum(present, axis=0) if present else np.full_like(points[..., 0], np.nan)
        return scores

    return Scored("mme", units, np.array(sums), formula, len(replies), remarks)


def prompt(row: Record) -> str:
    """MME's questions say themselves how to answer."""
    return str(row["text"])


def _result_files(path: Path) -> dict[Key, Reply]:
    """`SUBTASK.txt`: picture, question, truth and answer a line, with tabs between."""
    names = texts_in(path, "*.txt") if path.is_dir() else [path]
    if not names:
        raise RefusedInput(f"{path}: holds no SUBTASK.txt")
    lines: list[tuple[Key, Reply]] = []
    for name in names:
        for number, line in enumerate(read_text(name).split("\n"), 1):
            cells = line.rstrip("\r").split("\t")
            if line.strip() and len(cells) != 4:
                raise RefusedInput(
                    f"{name}: line {number} has {len(cells)} cells, not picture, question, truth, answer"
                )
            if line.strip():
                key = (_subtask(name.stem, name), Path(cells[0]).stem, cells[1].strip())
                lines.append((key, Reply(_truth(cells[2], name), cells[3])))
    keys = [key for key, _ in lines]
    same_rows(keys, keys, str(path), "lines", "questions")
    return dict(lines)


def _joined(path: Path, files: Files) -> dict[Key, Reply]:
    """Answers whose `question_id` is SUBTASK/PICTURE, two per id, joined by their question."""
    truth_path = files.truth("MME's questions_answers folders, its result files, or JSONL rows with `label`")
    truths, rows = _truths(truth_path), read_rows(path)
    named = [(task, picture, _bare(question)) for (task, picture, question), _ in truths]
    same_rows(named, named, str(truth_path), "rows", "questions")
    bare = dict(zip(named, truths, strict=True))
    keys = [_key(str(get(row, "question_id", path)), text_of(row, path, "prompt"), path) for row in rows]
    same_rows(bare, keys, str(path), "answer", "questions")
    return {
        bare[key][0]: Reply(bare[key][1], text_of(row, path)) for key, row in zip(keys, rows, strict=True)
    }


def _truths(path: Path) -> list[tuple[Key, str]]:
    """Each row's question and its right answer, as they stand."""
    if path.is_file() and path.suffix != ".txt":
        rows = read_rows(path)
        keys = [
            _key(str(get(row, "question_id", path)), str(row.get("text") or row.get("prompt") or ""), path)
            for row in rows
        ]
        return [
            (key, _truth(str(get(row, "label", path)), path)) for key, row in zip(keys, rows, strict=True)
        ]
    flat = [] if path.is_file() else [name for name in texts_in(path, "*.txt") if name.stem in SUBTASKS]
    if path.is_file() or flat:
        return [(key, reply.truth) for key, reply in _result_files(path).items()]
    truths: list[tuple[Key, str]] = []
    for name in texts_in(path, "*/**/*.txt"):
        subtask = _subtask(name.relative_to(path).parts[0], path)
        for line in filter(str.strip, read_text(name).split("\n")):
            question, _, truth = line.rstrip("\r").rpartition("\t")
            truths.append(((subtask, name.stem, question.strip()), _truth(truth, name)))
    if not truths:
        raise RefusedInput(f"{path}: holds no SUBTASK/.../PICTURE.txt")
    return truths


def _key(id_: str, question: str, path: Path) -> Key:
    subtask, _, picture = id_.rpartition("/")
    if not subtask:
        raise RefusedInput(f"{path}: question_id {id_!r} is not SUBTASK/PICTURE")
    return _subtask(subtask.split("/")[0], path), Path(picture).stem, _bare(question)


def _bare(question: str) -> str:
    """The question up to its question mark: files differ in what they add after it."""
    line = first_line(question)
    return line[: line.rindex("?") + 1] if "?" in line else line


def _subtask(name: str, path: Path) -> str:
    if name not in SUBTASKS:
        raise RefusedInput(f"{path}: subtask {name!r} is none of {', '.join(SUBTASKS)}")
    return name


def _truth(value: str, path: Path) -> str:
    truth = value.strip().lower()
    if truth not in ("yes", "no"):
        raise RefusedInput(f"{path}: the right answer {value!r} is neither yes nor no")
    return truth


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """A question file whose ids are SUBTASK/PICTURE, two questions each, with MME's own folder or rows as labels."""

    def unit(row: Record) -> str:
        subtask, picture, _ = _key(str(row["question_id"]), str(row["text"]), paper.copies["questions"])
        return f"{subtask}/{picture}"

    return from_questions(paper, prompt, unit), paper.files(labels=paper.labels)


BENCHMARK = Benchmark(
    name="mme",
    reads={
        "answers": "SUBTASK.txt files or JSONL",
        "labels": "with JSONL: MME's own folder or JSONL",
        "questions": "the same",
    },
    score=score,
    prompt=prompt,
    headline="perception",
    unit="points",
    gather=gather,
    needs=[["questions", "labels"]],
    answer_length=16,
    unit_name=lambda unit: f"{unit.key[0]}/{unit.key[1]}",
)
