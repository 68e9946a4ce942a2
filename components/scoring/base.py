"""What all benchmarks share: the files they read, what a score is made of, and joins that never guess.

An answer belongs to a question by what names it, never by its place in a file. Rows that are missing, doubled or
unknown are refused with their numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.scoring.bootstrap import Floats, Formula, point
from llava.errors import RefusedInput

Record = dict[str, Any]
MAX_FAILED = 0.5
"""The share of failed judgements above which there is no score."""
_NAMED = 5


@contextmanager
def foreign_rows(benchmark: str) -> Iterator[None]:
    """Turn what a row of another form makes Python say into a refusal: the files of a benchmark come from anybody."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise RefusedInput(
            f"{benchmark}: a row of its files is not of the form that the benchmark reads ({told}); "
            f"LLAVA_TRACEBACK=1 shows where"
        ) from error


class MissingFile(RefusedInput):
    """A file that a score cannot do without was not given; `field` is a field of `Files`."""

    def __init__(self, field: str, called: str, what: str) -> None:
        super().__init__(f"{called} is missing: {what}")
        self.field = field


@dataclass(frozen=True)
class Files:
    """The files a score is made from, and what belongs to them."""

    answers: Path | None = None
    questions: Path | None = None
    labels: Mapping[str, Path] = field(default_factory=dict)
    """By split; the key of a file that was given without one is empty."""
    splits: Path | None = None
    split: str = "test"
    """Which list of `splits`."""
    reviews: Sequence[Path] = ()
    """One file per judge run."""
    reference: Path | None = None
    """Answers of another model: of GPT-4 for the ScienceQA ensembles."""
    partial: bool = False
    """Score only what was answered, where the benchmark's own tool does so."""
    max_failed: float = MAX_FAILED
    context: Path | None = None
    """Notes on the pictures, for a judge that cannot see them."""
    judge_swap: bool = False
    """Whether every second of `reviews` shows the judge the candidate first."""
    called: Callable[[str], str] = field(default=str, compare=False)
    """How whoever gives the files calls a field: a message must name what the reader can change."""

    def need(self, name: str, what: str) -> Path:
        """The file of that field, or a refusal that says what it must hold."""
        path = getattr(self, name)
        if path is None:
            raise MissingFile(name, self.called(name), what)
        return Path(path)

    def truth(self, what: str) -> Path:
        """The one file that holds the right answers: `labels`, or `questions` where that names none."""
        if len(self.labels) > 1:
            raise RefusedInput(
                f"{self.called('labels')} is given {len(self.labels)} times; this benchmark takes one file"
            )
        path = next(iter(self.labels.values()), self.questions)
        if path is None:
            raise MissingFile("labels", self.called("labels"), what)
        return path


@dataclass(frozen=True)
class Unit:
    """One question (or picture, where that is what the benchmark draws), for a reader."""

    key: tuple[Hashable, ...]
    """What was asked and what was expected: two evaluations may be compared only if these are equal."""
    question: str
    expected: str
    answer: str
    value: float
    """How good the answer is, in the benchmark's own measure; nan where no judgement stands."""
    image: str | None = None
    failed: int = 0
    """Of its answers or judgements, how many could not be used."""


@dataclass(frozen=True)
class Scored:
    """A benchmark's outcome: `sums` has one row per unit, and `formula` turns their sum into the scores."""

    benchmark: str
    units: Sequence[Unit]
    sums: Floats
    formula: Formula
    n: int
    """Questions that were asked."""
    remarks: Sequence[str] = ()
    """What a reader of the score must know, one sentence each."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the `--json` object."""

    @property
    def failed(self) -> int:
        """Answers or judgements that could not be used; a failed answer is wrong, a failed judgement left out."""
        return sum(unit.failed for unit in self.units)

    @property
    def scores(self) -> dict[str, float]:
        """By name; a name with a slash stands for a nested object. nan: undefined."""
        return point(self.sums, self.formula)

    @property
    def values(self) -> NDArray[np.float64]:
        """`value` of each unit, shape (units,)."""
        return np.array([unit.value for unit in self.units], dtype=np.float64)


def read_text(path: Path) -> str:
    """A file of UTF-8 text, with or without a byte order mark; RefusedInput where it cannot be read as one."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RefusedInput(f"{path}: {error.strerror or error}; give the path of a file") from None
    except UnicodeDecodeError as error:
        raise RefusedInput(f"{path}: no UTF-8 text (byte {error.start}); convert it first") from None


def texts_in(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` that are named like `pattern`, sorted; RefusedInput for one that is no regular file."""
    found = sorted(folder.glob(pattern))
    for path in found:
        if not path.is_file():
            raise RefusedInput(f"{path}: no regular file; remove it")
    return found


def read_rows(path: Path) -> list[Record]:
    """The objects of a JSONL file or of a JSON list, in their order."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows: list[dict[str, Any]] = _parse(path, text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append(_parse(path, line, number))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RefusedInput(f"{path}: row {number} is no JSON object but {str(row)[:40]!r}")
    return rows


def read_json(path: Path) -> Any:
    """The one JSON value in `path`."""
    return _parse(path, read_text(path))


def read_object(path: Path) -> Record:
    """The one JSON object in `path`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RefusedInput(f"{path}: holds a {type(value).__name__}, not a JSON object keyed by id")
    return value


def get(row: Record, key: str, path: Path) -> Any:
    """`row[key]`, or a refusal that names file, row and key."""
    if key not in row:
        raise RefusedInput(f"{path}: no {key!r} in the row {json.dumps(row, ensure_ascii=False)[:120]}")
    return row[key]


def text_of(row: Record, path: Path, key: str = "text") -> str:
    """A text as it stands, no blank touched; null is an empty answer."""
    value = get(row, key, path)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RefusedInput(f"{path}: {key!r} is no text but {str(value)[:60]!r}")
    return value


def by_id(rows: Iterable[Record], path: Path, key: str = "question_id") -> dict[str, Record]:
    """Rows by the text of their id; refuses doubled ids."""
    rows = list(rows)
    ids = [str(get(row, key, path)) for row in rows]
    same_rows(ids, ids, f"{path}: {key}", "rows", "questions")
    return dict(zip(ids, rows, strict=True))


def same_rows(wanted: Iterable[Hashable], given: Iterable[Hashable], where: str, what: str, of: str) -> None:
    """Refuse `given` unless it names each of `wanted` once and nothing else; the numbers stand in the message."""
    asked, found = set(wanted), Counter(list(given))
    faults = {
        f"of {len(asked):,} {of} have no {what}": [key for key in asked if key not in found],
        f"{what} belong to none of the {of}": [key for key in found if key not in asked],
        f"{of} have {what} more than once": [key for key, count in found.items() if count > 1],
    }
    said = [f"{len(keys):,} {fault} ({_first(keys)})" for fault, keys in faults.items() if keys]
    if said:
        raise RefusedInput(f"{where}: {'; '.join(said)}. Nothing is scored: give files of the same {of}")


def first_line(text: str) -> str:
    """A question without the format instruction that prompts carry on further lines, and without the image slot."""
    lines = [line for line in text.replace("<image>", "").strip().split("\n") if line.strip()]
    return lines[0].strip() if lines else ""


def refuse_failures(failed: int, judged: int, files: Files, where: str) -> None:
    """No score where more than `files.max_failed` of the judgements failed, or where none is left."""
    limit = files.max_failed
    if judged and (failed > limit * judged or failed == judged):
        raise RefusedInput(
            f"{where}: {failed:,} of {judged:,} judgements failed ({100 * failed / judged:.1f} %), the limit is "
            f"{100 * limit:g} %: there is no score; judge the failed ones again, or raise {files.called('max_failed')}"
        )


def number_of(value: Any) -> float:
    """A stored number, nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("nan")


def table(columns: Sequence[Iterable[float]]) -> Floats:
    """Columns to an array of shape (units, columns)."""
    return np.stack([np.fromiter(column, dtype=np.float64) for column in columns], axis=1)


def _first(keys: Sequence[Hashable]) -> str:
    shown = sorted(" | ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys)
    return ("first: " if len(shown) > _NAMED else "") + ", ".join(shown[:_NAMED])


def _parse(path: Path, text: str, line: int | None = None) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> Record:
        found = dict(pairs)
        if len(found) < len(pairs):  # Python keeps the last of two equal keys
            same_rows(found, [key for key, _ in pairs], str(path), "entries", "keys")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        lineno, what = (
            getattr(error, "lineno", 1),
            getattr(error, "msg", "") or "a number too long, or too deep",
        )
        at = f"line {lineno if line is None else line}"
        raise RefusedInput(f"{path}: {at} is no JSON ({what}); the file may be cut short") from None
