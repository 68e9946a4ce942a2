"""ScienceQA: multiple choice with and without pictures, nine columns, and ensembles with a second model.

`problems.json` holds the questions by id, `pid_splits.json` which of them are the test. The picture subset that
later papers call SQA is the column IMG.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from components.scoring.base import (
    Files,
    MissingFile,
    Record,
    Scored,
    Unit,
    by_id,
    get,
    read_object,
    read_rows,
    same_rows,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.letters import LETTERS, letter, options
from components.scoring.benchmarks.reading import Item, Paper, answer_row
from components.scoring.bootstrap import Floats, point
from components.scoring.judge import Ask, JudgeTask, sections
from llava.errors import RefusedInput

_LETTER_WANTED = 'End with the sentence "The answer is X.", where X is the letter of your choice.'

Style = Literal["CQM-A", "QCM-LEA"]
SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
COLUMNS = ("average", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")


@dataclass(frozen=True)
class Problem:
    """A question of `problems.json`, checked."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    columns: tuple[bool, ...]
    """Whether it counts in each of `COLUMNS`."""
    image: str | None

    def right(self, given: str | None) -> bool:
        """Whether the letter is the right one."""
        return given is not None and given == LETTERS[self.answer]

    def valid(self, given: str | None) -> bool:
        """Whether the letter names a choice."""
        return given is not None and LETTERS.index(given) < len(self.choices)


def score(files: Files) -> Scored:
    """The nine columns in percent; an answer without a letter, or with one beyond the choices, is wrong."""
    answers_path = files.need("answers", "the answers JSONL (question_id, text)")
    path = files.truth("problems.json")
    problems = read_problems(path, files.splits, files.split, files.called)
    answers = read_texts(answers_path, [problem.id for problem in problems])
    letters = {id_: letter(text) for id_, text in answers.items()}
    unparsed = sum(given is None for given in letters.values())
    beyond = sum(
        letters[problem.id] is not None and not problem.valid(letters[problem.id]) for problem in problems
    )
    remarks = []
    if unparsed or beyond:
        remarks.append(
            f"{unparsed:,} answers give no letter and {beyond:,} a letter beyond the choices: all count as wrong"
        )
    units = [
        Unit((problem.id, problem.question, *problem.choices, problem.answer), problem.question,
             LETTERS[problem.answer], answers[problem.id], float(problem.right(letters[problem.id])),
             problem.image, int(not problem.valid(letters[problem.id])))
        for problem in problems
    ]  # fmt: skip
    extra: dict[str, Any] = {"failures": {"no letter": unparsed, "letter beyond the choices": beyond}}
    if files.reference is not None:
        others = {id_: letter(text) for id_, text in read_texts(files.reference, list(answers)).items()}
        extra["ensembles"] = _ensembles(problems, letters, others, files.reviews)
    elif files.reviews:
        raise MissingFile(
            "reference", files.called("reference"), "reviews of scienceqa are verdicts between two models"
        )
    sums = _sums(problems, [bool(unit.value) for unit in units])
    return Scored("scienceqa", units, sums, _formula, len(units), remarks, extra)


def read_problems(
    path: Path, splits: Path | None, split: str, called: Callable[[str], str] = str
) -> list[Problem]:
    """The problems of `split`, or all of them without a splits file; each checked."""
    rows = read_object(path)
    if splits is None:
        ids = list(rows)
    else:
        lists = read_object(splits)
        if split not in lists:
            raise RefusedInput(
                f"{splits}: no split {split!r} but {', '.join(lists)}; choose with {called('split')}"
            )
        ids = [str(id_) for id_ in lists[split]]
        same_rows(ids, ids, f"{splits}: {split}", "entries", "problems")
    missing = [id_ for id_ in ids if id_ not in rows]
    if missing:
        raise RefusedInput(
            f"{path}: {len(missing):,} of {len(ids):,} problems are missing ({', '.join(missing[:5])}); nothing is "
            "scored: give the problems.json that the splits belong to"
        )
    return [_problem(id_, rows[id_], path) for id_ in ids]


def prompt(row: Record, style: Style = "CQM-A") -> str:
    """A problem as the user's turn: CQM has the context first, QCM the question; both end in the options."""
    context = str(row.get("hint") or "").strip() or "none"
    parts = {
        "C": f"Context: {context}",
        "Q": f"Question: {row['question']}",
        "M": f"Options: {options(row['choices'])}",
    }
    return "\n".join(parts[part] for part in style.split("-")[0])


def reply(row: Record, style: Style = "QCM-LEA") -> str:
    """The turn that a model is trained to give: the answer, in LEA after lecture and explanation."""
    answer = f"The answer is {LETTERS[row['answer']]}."
    if style.endswith("-A"):
        return answer
    reasons = [str(row.get(part) or "").strip() for part in ("lecture", "solution")]
    return "\n".join([*filter(None, reasons), answer])


def conversations(
    problems: Mapping[str, Record], ids: Sequence[str], style: Style = "QCM-LEA"
) -> list[Record]:
    """Training samples in LLaVA format; the picture, where there is one, is `ID/NAME` as ScienceQA stores it."""
    samples = []
    for id_ in ids:
        row = problems[id_]
        picture = {"image": f"{id_}/{row['image']}"} if row.get("image") else {}
        asked = ("<image>\n" if picture else "") + prompt(row, style)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": reply(row, style)}]
        samples.append({"id": id_, **picture, "conversations": turns})
    return samples


def complement(own: str | None, other: str | None) -> str | None:
    """The other model's letter, and our own where it gave none."""
    return own if other is None else other


def differ(own: Mapping[str, str | None], other: Mapping[str, str | None]) -> list[str]:
    """The ids on which the two do not give the same letter: what a judge decides."""
    return [id_ for id_ in own if own[id_] is None or own[id_] != other[id_]]


def _ensembles(
    problems: Sequence[Problem],
    own: Mapping[str, str | None],
    other: Mapping[str, str | None],
    reviews: Sequence[Path],
) -> dict[str, Any]:
    """The nine columns of the complement, and of the judge where its verdicts are given."""
    joined = {id_: complement(own[id_], other[id_]) for id_ in own}
    scored = {"complement": _columns(problems, joined) | {"failed": sum(v is None for v in joined.values())}}
    if len(reviews) > 1:
        raise RefusedInput(f"{len(reviews)} files of verdicts are given; scienceqa takes one")
    if reviews:
        rows, open_ = read_rows(reviews[0]), differ(own, other)
        same_rows(open_, [str(get(row, "question_id", reviews[0])) for row in rows], str(reviews[0]),
                  "verdict", "disagreements")  # fmt: skip
        verdicts = {
            id_: letter(text_of(row, reviews[0], "content")) for id_, row in by_id(rows, reviews[0]).items()
        }
        judged = {id_: verdicts[id_] if id_ in verdicts else own[id_] for id_ in own}
        failed = sum(verdict is None for verdict in verdicts.values())
        scored["judge"] = _columns(problems, judged) | {"failed": failed, "disagreements": len(open_)}
    return scored


def _columns(problems: Sequence[Problem], letters: Mapping[str, str | None]) -> dict[str, float]:
    return point(_sums(problems, [problem.right(letters[problem.id]) for problem in problems]), _formula)


def _sums(problems: Sequence[Problem], right: Sequence[bool]) -> Floats:
    """Shape (problems, 18): in each column or not, and right there or not."""
    inside: NDArray[np.float64] = np.array([problem.columns for problem in problems], dtype=np.float64)
    return np.concatenate([inside, inside * np.array(right, dtype=np.float64)[:, None]], axis=1)


def _formula(sums: Floats) -> dict[str, Floats]:
    width = len(COLUMNS)
    return {name: 100 * sums[..., width + index] / sums[..., index] for index, name in enumerate(COLUMNS)}


def read_texts(path: Path, ids: Sequence[str]) -> dict[str, str]:
    """Answers by problem id: JSONL rows (`text`, or `content` as a judge stores it), or an object with `outputs`."""
    if path.suffix == ".json":
        outputs = get(read_object(path), "outputs", path)
        same_rows(ids, [str(id_) for id_ in outputs], str(path), "answer", "problems")
        return {str(id_): str(text or "") for id_, text in outputs.items()}
    rows = read_rows(path)
    same_rows(ids, [str(get(row, "question_id", path)) for row in rows], str(path), "answer", "problems")
    return {
        id_: text_of(row, path, "text" if "text" in row else "content")
        for id_, row in by_id(rows, path).items()
    }


def _problem(id_: str, row: Record, path: Path) -> Problem:
    choices, answer = list(get(row, "choices", path)), get(row, "answer", path)
    subject, grade = str(get(row, "subject", path)), str(get(row, "grade", path)).removeprefix("grade")
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
        raise RefusedInput(f"{path}: problem {id_}: answer {answer!r} is none of its {len(choices)} choices")
    if subject not in SUBJECTS.values():
        raise RefusedInput(
            f"{path}: problem {id_}: subject {subject!r} is none of {', '.join(SUBJECTS.values())}"
        )
    if not grade.isdigit() or not 1 <= int(grade) <= 12:
        raise RefusedInput(f"{path}: problem {id_}: grade {row['grade']!r} is none of grade1 to grade12")
    text, image = bool(row.get("hint")), row.get("image")
    columns = (
        True, *(subject == name for name in SUBJECTS.values()), text, bool(image),
        not text and not image, int(grade) <= 6, int(grade) > 6,
    )  # fmt: skip
    return Problem(id_, str(get(row, "question", path)), tuple(map(str, choices)), answer, columns,
                   f"{id_}/{image}" if image else None)  # fmt: skip


def answer_tasks(problems: Path, ids: Iterable[str]) -> list[JudgeTask]:
    """ScienceQA for a text-only model: the problem as it stands."""
    rows = read_object(problems)
    return [
        JudgeTask({"question_id": id_}, f"{prompt(rows[id_], 'QCM-LEA')}\n{_LETTER_WANTED}") for id_ in ids
    ]


def verdict_tasks(
    problems: Path, ids: Iterable[str], own: Mapping[str, str], other: Mapping[str, str]
) -> list[JudgeTask]:
    """ScienceQA where two models differ: the problem and both answers."""
    rows = read_object(problems)
    return [
        JudgeTask({"question_id": id_}, sections({
            "Problem": prompt(rows[id_], "QCM-LEA"), "Answer 1": own[id_], "Answer 2": other[id_],
            "Task": f"The answers differ or give no choice. Decide for yourself. {_LETTER_WANTED}",
        })) for id_ in ids
    ]  # fmt: skip


def parse_letter(content: str | None) -> str | None:
    """The letter in a judge's reply; see `letters.letter`."""
    return letter(content or "")


def letters_of(texts: Mapping[str, str]) -> dict[str, str | None]:
    """The letter of each answer."""
    return {id_: letter(text) for id_, text in texts.items()}


def judge(files: Files, ask: Ask) -> None:
    """A text-only model's answers as the reference, where that is JSONL, and its verdicts where two models differ."""
    answers = files.need("answers", "the candidate's answers JSONL")
    reference = files.need("reference", "the other model's answers, which the judge sees too")
    problems = files.truth("problems.json")
    ids = [problem.id for problem in read_problems(problems, files.splits, files.split, files.called)]
    own = read_texts(answers, ids)
    if reference.suffix != ".json":
        ask(answer_tasks(problems, ids), reference, parse_letter)
    other = read_texts(reference, ids)
    for path in files.reviews:
        ask(
            verdict_tasks(problems, differ(letters_of(own), letters_of(other)), own, other),
            path,
            parse_letter,
        )


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """The problems of the split; pictures lie in ID/NAME beside them."""
    labels, splits = paper.copies["labels"], paper.copies.get("splits")
    settings = paper.settings
    pictures, rows = paper.pictures(str(settings.labels)), read_object(labels)
    items = []
    for problem in read_problems(labels, splits, settings.split, paper.called):
        text = prompt(rows[problem.id], settings.style)
        text = f"{text}\n{settings.instruction}" if settings.instruction else text
        items.append(Item(text, pictures(problem.image), answer_row(problem.id, problem.image), problem.id))
    return items, paper.files(labels={"": labels}, splits=splits, split=settings.split)


BENCHMARK = Benchmark(
    name="scienceqa",
    reads={
        "answers": "JSONL",
        "labels": "problems.json",
        "splits": "pid_splits.json",
        "split": "which list of it",
        "reference": "for ensembles: the other model's answers",
        "reviews": "for ensembles: verdicts",
    },
    score=score,
    prompt=prompt,
    headline="average",
    gather=gather,
    needs=[["labels"]],
    options=["splits", "split", "style"],
    answer_length=512,
    right_or_wrong=True,
    judge=judge,
)
