"""LLaVA-Bench: a judge marks a reference answer and the candidate's from 1 to 10; the score is their ratio.

Reviews are parsed again from their text. One that gives no two marks is a failure: it is left out and counted.
Several files are several runs of the judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.scoring.base import (
    Files,
    MissingFile,
    Record,
    Scored,
    Unit,
    by_id,
    read_rows,
    refuse_failures,
    same_rows,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.reading import Item, Paper, from_questions
from components.scoring.bootstrap import Floats, point
from components.scoring.judge import Ask, JudgeTask, sections
from llava.errors import RefusedInput

_MARKS_WANTED = (
    "You cannot see the picture; the notes above describe it. How helpful, relevant, correct and detailed "
    "is each of the two answers? Mark each from 1 to 10, where more is better. Your first line must hold "
    "the mark of answer 1 and the mark of answer 2, with one blank between them, and nothing else. "
    "Explain the marks on the lines below, and do not let the order of the answers count."
)

CATEGORIES = ("conversation", "detail", "complex")
LOWEST, HIGHEST = 1.0, 10.0
_PREFIX = "llava_bench_"
_SHORT = {"conv": "conversation"}
_MARK = r"([+-]?\d+(?:\.\d+)?)"
_MARKS = re.compile(rf"{_MARK}(?:\s*,\s*|\s+){_MARK}")


@dataclass(frozen=True)
class Review:
    """One judgement; `marks` are (reference, candidate) whatever order the judge saw them in, None if it failed."""

    category: str | None
    marks: tuple[float, float] | None


def parse(content: str | None) -> tuple[float, float] | None:
    """The two marks, which stand alone on the review's first line, a blank or a comma between; None otherwise.

    A third number, another scale ("8/10"), words before, and marks outside 1 to 10 are failures.
    """
    lines = (content or "").strip().splitlines()
    found = _MARKS.fullmatch(lines[0].strip()) if lines else None
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    inside = LOWEST <= first <= HIGHEST and LOWEST <= second <= HIGHEST
    return (first, second) if inside else None


def score(files: Files) -> Scored:
    """100 x mean(candidate) / mean(reference), over all and per category, then the mean over the judge's runs."""
    if not files.reviews:
        raise MissingFile(
            "reviews", files.called("reviews"), "the judge's JSONL, once per run (or name a judge)"
        )
    answers = _optional(files.answers)
    questions = _optional(files.questions)
    remarks: list[str] = []
    runs = [_read_run(path, files.answers, answers, remarks) for path in files.reviews]
    asked = list(questions or answers or dict.fromkeys(id_ for run in runs for id_ in run))
    if answers is not None:
        same_rows(asked, answers, str(files.answers), "answer", "questions")
    for path, run in zip(files.reviews, runs, strict=True):
        unknown = [id_ for id_ in run if id_ not in set(asked)]
        if unknown:
            raise RefusedInput(
                f"{path}: {len(unknown):,} of {len(run):,} reviews belong to no question ({', '.join(unknown[:5])}); "
                "nothing is scored: give the reviews of these answers"
            )
    categories = _categories(asked, runs, questions)
    failed = sum(id_ not in run or run[id_].marks is None for run in runs for id_ in asked)
    unjudged = sum(id_ not in run for run in runs for id_ in asked)
    if unjudged:
        remarks.append(f"{unjudged:,} judgements are missing and count as failed")
    if failed:
        remarks.append(f"{failed:,} of {len(asked) * len(runs):,} judgements failed and are left out")
    refuse_failures(failed, len(asked) * len(runs), files, ", ".join(map(str, files.reviews)))
    sums, units = [], []
    for id_ in asked:
        marks = [run[id_].marks if id_ in run else None for run in runs]
        pairs = np.array([pair or (0.0, 0.0) for pair in marks])
        inside = np.array([1.0, *(categories[id_] == name for name in CATEGORIES)])
        sums.append((pairs[:, None, :] * inside[None, :, None]).ravel())
        given = [candidate - reference for reference, candidate in filter(None, marks)]
        text = str((answers or {}).get(id_, {}).get("text", ""))
        asked_text, image = (questions or {}).get(id_, {}), (questions or {}).get(id_, {}).get("image")
        units.append(
            Unit((id_, categories[id_] or ""), str(asked_text.get("text", "")), "", text,
                 float(np.mean(given)) if given else float("nan"), image, len(marks) - len(given))
        )  # fmt: skip
    by_run = _Ratio(len(runs))
    array = np.array(sums, dtype=np.float64)
    extra: dict[str, Any] = {}
    if len(runs) > 1:
        each = [by_run.of_run(point(array, by_run.every), index) for index in range(len(runs))]
        extra["runs"] = each
        extra["spread"] = {name: float(np.std([run[name] for run in each], ddof=1)) for name in each[0]}
    return Scored("llava-bench", units, array, by_run.mean, len(asked), remarks, extra)


@dataclass(frozen=True)
class _Ratio:
    """Ratios from sums of shape (..., runs x (1 + categories) x 2)."""

    runs: int

    def every(self, sums: Floats) -> dict[str, Floats]:
        """By run and category."""
        marks = sums.reshape(*sums.shape[:-1], self.runs, 1 + len(CATEGORIES), 2)
        ratio = 100 * marks[..., 1] / marks[..., 0]
        return {
            f"{run}/{name}": ratio[..., run, index]
            for run in range(self.runs)
            for index, name in enumerate(("all", *CATEGORIES))
        }

    def mean(self, sums: Floats) -> dict[str, Floats]:
        """By category, the mean over runs."""
        every = self.every(sums)
        return {
            name: np.mean([every[f"{run}/{name}"] for run in range(self.runs)], axis=0)
            for name in ("all", *CATEGORIES)
        }

    @staticmethod
    def of_run(every: Mapping[str, float], run: int) -> dict[str, float]:
        """One run's scores out of `every`."""
        return {name: every[f"{run}/{name}"] for name in ("all", *CATEGORIES)}


def prompt(row: Record) -> str:
    """The question as it stands: long answers are wanted."""
    return str(row["text"])


def category_of(name: str | None) -> str | None:
    """The key of a category as files write it (`llava_bench_conv`, `conv`); None where a file names none."""
    if name is None:
        return None
    bare = name.removeprefix(_PREFIX)
    known = _SHORT.get(bare, bare)
    if known not in CATEGORIES:
        raise RefusedInput(f"category {name!r} is none of {', '.join(CATEGORIES)}")
    return known


def _optional(path: Path | None) -> dict[str, Record] | None:
    return None if path is None else by_id(read_rows(path), path)


def _read_run(
    path: Path, answers_path: Path | None, answers: Mapping[str, Record] | None, remarks: list[str]
) -> dict[str, Review]:
    """One judge run by question id; what disagrees with its own text or with the answers is remarked.

    The reference stands first, unless a row says `"swapped": true`: an order is never guessed from ids.
    """
    rows = by_id(read_rows(path), path)
    run, disagree, foreign = {}, [], []
    for id_, row in rows.items():
        content = text_of(row, path, "content") if "content" in row else ""
        marks, stored = parse(content), row.get("tuple")
        if stored is not None and not _same(stored, marks):
            disagree.append(f"{id_} ({stored} stored, {list(marks) if marks else 'a failure'} in its text)")
        if not _judges(row, (answers or {}).get(id_)):
            foreign.append(id_)
        if marks is not None and row.get("swapped"):
            marks = (marks[1], marks[0])
        run[id_] = Review(category_of(row.get("category")), marks)
    if disagree:
        remarks.append(
            f"{path}: {len(disagree):,} stored scores disagree with the text of their review, which counts: "
            + "; ".join(disagree[:5])
        )
    if foreign:
        remarks.append(
            f"{path}: {len(foreign):,} reviews name none of the answers in {answers_path} (first: {foreign[0]}): "
            "they may judge another model"
        )
    return run


def _same(stored: Any, marks: tuple[float, float] | None) -> bool:
    """[-1, -1] is how the reference marks a review that it could not read."""
    return bool(stored == ([-1, -1] if marks is None else list(marks)))


def _judges(row: Record, answer: Record | None) -> bool:
    """Whether the review can be of `answer`: the candidate stands second, or first where the order was swapped."""
    named = row.get("answer1_id" if row.get("swapped") else "answer2_id")
    if answer is None or named is None:
        return True
    return str(named) in {str(answer.get(key)) for key in ("answer_id", "question_id")}


def _categories(
    asked: Sequence[str], runs: Sequence[Mapping[str, Review]], questions: Mapping[str, Record] | None
) -> dict[str, str | None]:
    """Each question's category: from the question file, else from the reviews, which must agree."""
    found: dict[str, str | None] = {}
    for id_ in asked:
        named = Counter(run[id_].category for run in runs if id_ in run and run[id_].category)
        if questions is not None and questions[id_].get("category"):
            named[category_of(questions[id_]["category"])] += 1
        if len(named) > 1:
            raise RefusedInput(f"question {id_} has {len(named)} categories: {', '.join(map(str, named))}")
        found[id_] = next(iter(named), None)
    return found


def marks_tasks(
    questions: Path, context: Path, reference: Path, answers: Path, swapped: bool = False
) -> list[JudgeTask]:
    """LLaVA-Bench: question, notes on the picture, and both answers; the candidate second, or first if `swapped`.

    `context` rows hold `image` and `caption` or `captions` (and `instances` with boxes, or nothing).
    """
    asked = by_id(read_rows(questions), questions)
    notes = {str(row["image"]): _notes(row) for row in read_rows(context)}
    sides = []
    for path in (reference, answers):
        rows = by_id(read_rows(path), path)
        same_rows(asked, rows, str(path), "answer", "questions")
        sides.append(rows)
    without = [id_ for id_, row in asked.items() if str(row.get("image")) not in notes]
    if without:
        raise RefusedInput(
            f"{context}: no notes on the pictures of {len(without):,} questions (first: {without[0]})"
        )
    tasks = []
    for number, (id_, row) in enumerate(asked.items(), 1):
        pair = [side[id_] for side in (sides[::-1] if swapped else sides)]
        names = [str(one.get("answer_id", one["question_id"])) for one in pair]
        stored = {"id": number, "question_id": row["question_id"], "answer1_id": names[0], "answer2_id": names[1],
                  "category": row.get("category")} | ({"swapped": True} if swapped else {})  # fmt: skip
        parts = {"Notes on the picture": notes[str(row["image"])], "Question": row["text"],
                 "Answer 1": pair[0]["text"], "Answer 2": pair[1]["text"], "Task": _MARKS_WANTED}  # fmt: skip
        tasks.append(JudgeTask(stored, sections(parts)))
    return tasks


def _notes(row: Record) -> str:
    """What is known of a picture as text: its captions, then a box per line."""
    said = row.get("captions") or row.get("caption") or []
    lines = [said] if isinstance(said, str) else [str(one) for one in said]
    for thing in row.get("instances", []):
        lines.append(f"{thing['category']}: {[round(float(edge), 3) for edge in thing['bbox']]}")
    return "\n".join(lines)


def judge(files: Files, ask: Ask) -> None:
    """Marks for each of `files.reviews`, a run of the judge each."""
    answers = files.need("answers", "the candidate's answers JSONL")
    reference = files.need("reference", "the answers that the judge compares with")
    questions = files.need("questions", "the question file (question_id, image, text, category)")
    context = files.need(
        "context", "notes on the pictures (image, caption), for a judge that cannot see them"
    )
    if not files.reviews:
        raise MissingFile("reviews", files.called("reviews"), "a file for each run of the judge")
    for run, path in enumerate(files.reviews):
        tasks = marks_tasks(questions, context, reference, answers, files.judge_swap and run % 2 == 1)
        ask(tasks, path, parse, "tuple")


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """The question file; the answers that a judge compares with, where there are some."""
    copies = paper.copies
    items = from_questions(paper, prompt)
    return items, paper.files(
        questions=copies["questions"],
        reference=copies.get("reference"),
        context=copies.get("context"),
        max_failed=paper.settings.max_failed,
    )


def unscored(files: Files) -> str | None:
    """Without reviews there is no score."""
    return None if files.reviews else "no judge is named"


BENCHMARK = Benchmark(
    name="llava-bench",
    reads={
        "reviews": "JSONL (once per judge run)",
        "answers": "JSONL",
        "questions": "JSONL",
        "max_failed": "a share",
    },
    judge_reads={
        "reference": "JSONL",
        "context": "JSONL of image, caption",
        "judge_swap": "whether every second run shows the candidate first",
    },
    score=score,
    prompt=prompt,
    headline="all",
    gather=gather,
    needs=[["questions"]],
    answer_length=1024,
    judge=judge,
    unscored=unscored,
)
