"""MMBench: multiple choice, asked once per rotation of the options; circular counts a question with all rounds right.

The answers file says in `option_char` which option stood behind each letter of a round.
"""

from __future__ import annotations

import base64
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from components.scoring.base import (
    Files,
    Record,
    Scored,
    Unit,
    by_id,
    get,
    read_rows,
    read_text,
    same_rows,
    table,
    text_of,
)
from components.scoring.benchmarks.benchmark import Benchmark
from components.scoring.benchmarks.letters import LETTERS, letter
from components.scoring.benchmarks.reading import Item, Paper, answer_row
from components.scoring.bootstrap import Floats
from components.scoring.pictures import Picture
from llava.errors import RefusedInput

MOST = 4
_ABSENT = frozenset(["", "nan", "none"])
ROTATION = 1_000_000
"""In files where each rotation is a row of its own, the index grows by this per round."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """A row of the benchmark's table."""

    text: str
    options: tuple[str, ...]
    answer: str
    category: str


def parse(answer: str, options: Sequence[str]) -> str | None:
    """The letter that the answer gives, or that of the one option whose text it is; None otherwise.

    Besides ScienceQA's rule a letter may carry brackets or one mark, as in "(B)" or "B:".
    """
    allowed = LETTERS[: len(options)]
    found = letter(answer.strip())
    if found is None:
        alone = re.fullmatch(r"\(?([A-Za-z])[).:]?", answer.strip())
        found = alone[1].upper() if alone else None
    if found is not None:
        return found if found in allowed else None
    said = answer.strip().rstrip(".").casefold()
    named = [
        name
        for name, option in zip(allowed, options, strict=True)
        if option.strip().rstrip(".").casefold() == said
    ]
    return named[0] if said and len(named) == 1 else None


def score(files: Files) -> Scored:
    """`accuracy` of the unrotated round, `circular` over all rounds (undefined with one round); in percent."""
    path = files.need("answers", "the answers JSONL (question_id, round_id, text, options, option_char)")
    questions = read_questions(files.truth("MMBench's table (index, question, A, B, C, D, answer)"))
    rounds: dict[str, dict[int, Record]] = defaultdict(dict)
    for row in read_rows(path):
        id_, number = _name(row, path)
        if number in rounds[id_]:
            raise RefusedInput(
                f"{path}: question {id_} is answered twice in round {number}; nothing is scored"
            )
        rounds[id_][number] = row
    same_rows(questions, rounds, str(path), "answer", "questions")
    circular = any(len(rows) > 1 for rows in rounds.values())
    odd = [
        id_ for id_, rows in rounds.items()
        if sorted(rows) != list(range(len(questions[id_].options) if circular else 1))
    ]  # fmt: skip
    if odd:
        raise RefusedInput(
            f"{path}: {len(odd):,} of {len(questions):,} questions have not one answer for each rotation of their "
            f"options (first: {odd[0]}); nothing is scored"
        )
    units, first, every = [], [], []
    for id_, question in questions.items():
        right, failed = [], 0
        for number, row in sorted(rounds[id_].items()):
            shown, meaning = _shown(row, number, question, path)
            given = parse(text_of(row, path), shown)
            failed += given is None
            right.append(given is not None and meaning[LETTERS.index(given)] == question.answer)
        first.append(right[0])
        every.append(all(right))
        answer = " / ".join(text_of(row, path) for _, row in sorted(rounds[id_].items()))
        units.append(
            Unit((id_, question.text, *question.options, question.answer, len(right)), question.text,
                 question.answer, answer, float(all(right)), id_, failed)
        )  # fmt: skip

    def formula(sums: Floats) -> dict[str, Floats]:
        n = sums[..., 0]
        rotated = 100 * sums[..., 2] / n if circular else np.full_like(n, np.nan)
        return {"accuracy": 100 * sums[..., 1] / n, "circular": rotated}

    failed = sum(unit.failed for unit in units)
    remarks = [f"{failed:,} answers name no option and count as wrong"] if failed else []
    if not circular:
        remarks.append("only one round: there is no circular score")
    return Scored("mmbench", units, table([np.ones(len(units)), first, every]), formula, len(units), remarks)


def read_questions(path: Path) -> dict[str, ChoiceQuestion]:
    """The table by index, without its rotated rows."""
    return {id_: _question(id_, row, path) for id_, row in _rows(path).items() if int(id_) < ROTATION}


def _rows(path: Path) -> dict[str, Record]:
    """The table by index: TSV or CSV as MMBench ships it, or JSONL."""
    if path.suffix in (".tsv", ".csv"):
        csv.field_size_limit(sys.maxsize)  # pictures stand in the table as base64
        cells = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t" if path.suffix == ".tsv" else ",")
        rows: list[Record] = list(cells)
    else:
        rows = read_rows(path)
    for row in rows:
        row.setdefault("index", row.get("question_id"))
    named = by_id(rows, path, key="index")
    odd = [id_ for id_ in named if not id_.isdecimal()]
    if odd:
        raise RefusedInput(
            f"{path}: {len(odd):,} of {len(named):,} rows have no number as index ({odd[0]!r})"
        )
    return named


def prompt(row: Record) -> str:
    """Hint, question and options, one a line, and the wish for a letter."""
    options = [f"{name}. {row[name]}" for name in LETTERS[:MOST] if not _absent(row.get(name))]
    hint = [] if _absent(row.get("hint")) else [str(row["hint"])]
    return "\n".join([*hint, str(row["question"]), *options, "Reply with the letter of the right option."])


def rotations(row: Record) -> list[Record]:
    """The same question once per option, each time with the first option moved to the end."""
    names = [name for name in LETTERS[:MOST] if not _absent(row.get(name))]
    return [
        row | dict(zip(names, [row[name] for name in names[turn:] + names[:turn]], strict=True))
        for turn in range(len(names))
    ]


def _question(id_: str, row: Record, path: Path) -> ChoiceQuestion:
    options = tuple(str(row[name]) for name in LETTERS[:MOST] if not _absent(row.get(name)))
    answer = str(get(row, "answer", path)).strip()
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise RefusedInput(f"{path}: question {id_}: answer {answer!r} is none of its {len(options)} options")
    return ChoiceQuestion(str(get(row, "question", path)), options, answer, str(row.get("category") or ""))


def _name(row: Record, path: Path) -> tuple[str, int]:
    """Question and round, from `round_id` or from an index that counts the rotations."""
    id_ = str(get(row, "question_id", path))
    if row.get("round_id") is None and id_.isdigit() and int(id_) >= ROTATION:
        return str(int(id_) % ROTATION), int(id_) // ROTATION
    return id_, int(row.get("round_id") or 0)


def _shown(row: Record, number: int, question: ChoiceQuestion, path: Path) -> tuple[list[str], list[str]]:
    """The options in the order in which they were shown, and the table's letter of each."""
    names = list(LETTERS[: len(question.options)])
    meaning = list(row.get("option_char") or names[number:] + names[:number])
    if sorted(meaning) != names:
        raise RefusedInput(f"{path}: question {row['question_id']}, round {number}: option_char {meaning} is no order "
                           f"of {names}")  # fmt: skip
    shown = [question.options[LETTERS.index(name)] for name in meaning]
    if row.get("options") is not None and [str(option) for option in row["options"]] != shown:
        raise RefusedInput(f"{path}: question {row['question_id']}, round {number}: its options are not the table's; "
                           "give the table that was asked")  # fmt: skip
    return shown, meaning


def _absent(value: object) -> bool:
    return value is None or str(value).strip().lower() in _ABSENT


def gather(paper: Paper) -> tuple[list[Item], Files]:
    """Each row of the table once per rotation of its options; pictures stand in it as base64, or lie in `images`."""
    path = paper.copies["labels"]
    pictures = paper.pictures(str(paper.settings.labels))
    items = []
    for id_, row in _rows(path).items():
        if int(id_) >= ROTATION:
            continue
        names = [name for name in LETTERS[:MOST] if not _absent(row.get(name))]
        picture = _picture(row, pictures, path)
        for number, turned in enumerate(rotations(row)):
            stored = answer_row(id_, None) | {
                "round_id": number,
                "options": [str(turned[name]) for name in names],
                "option_char": names[number:] + names[:number],
            }
            text = prompt(turned)
            if paper.settings.instruction is not None:
                text = "\n".join([*text.split("\n")[:-1], *filter(None, [paper.settings.instruction])])
            items.append(Item(text, picture, stored, id_))
    return items, paper.files(labels=paper.labels)


def _picture(row: Record, look: Callable[[str | None], Picture | None], path: Path) -> Picture | None:
    """A name with an ending is a file's; anything else is the picture itself, as MMBench ships it."""
    cell = row.get("image")
    if _absent(cell) or PurePosixPath(str(cell)).suffix:
        return look(None if _absent(cell) else str(cell))
    try:
        return Picture.of(base64.b64decode(str(cell), validate=True))
    except ValueError:
        raise RefusedInput(
            f"{path}: row {row['index']}: its picture is neither a file's name nor base64"
        ) from None


BENCHMARK = Benchmark(
    name="mmbench",
    reads={"answers": "JSONL (round_id for circular)", "labels": "MMBench's TSV", "questions": "the same"},
    score=score,
    prompt=prompt,
    headline="accuracy",
    gather=gather,
    needs=[["labels"]],
    answer_length=16,
)
