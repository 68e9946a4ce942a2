"""What a benchmark is: one line of the table, made in the benchmark's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.scoring.base import Files, Record, Scored, Unit, foreign_rows
from components.scoring.benchmarks.reading import Item, Paper
from components.scoring.judge import Ask
from llava.data.jsonl import to_jsonl


def by_first_key(unit: Unit) -> str:
    """The name of a unit that is a question: its id."""
    return str(unit.key[0])


def as_lines(items: Sequence[Item], rows: Sequence[Record]) -> tuple[str, str]:
    """Answers as JSONL: the file's ending and its text. `rows`: `question_id, prompt, text` and who answered."""
    return ".jsonl", to_jsonl(rows).decode()


_READ_FILES = ("score", "gather", "judge", "unscored")


@dataclass(frozen=True)
class _Reading:
    """What reads a benchmark's files, which anybody may have made."""

    benchmark: str
    work: Callable[..., Any]

    def __call__(self, *given: Any) -> Any:
        with foreign_rows(self.benchmark):
            return self.work(*given)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A line of the table: all that is known of one benchmark."""

    name: str
    reads: Mapping[str, str]
    """Which fields of `Files` it is scored from, and what each holds."""
    judge_reads: Mapping[str, str] = field(default_factory=dict)
    """Which more of them its judge needs: without a judge they change nothing."""
    score: Callable[[Files], Scored]
    prompt: Callable[[Record], str]
    """A question's row to what the user would type."""
    headline: str
    """The score that stands for the benchmark where one number must."""
    unit: str = "%"
    """Of its scores; empty for a bare number."""
    digits: int = 1
    """Behind the point."""
    times: float = 1.0
    """What its scores are multiplied with in a chart beside percents."""
    gather: Callable[[Paper], tuple[list[Item], Files]]
    """From its files to the questions that a model is asked, and the files that its answers are scored with."""
    needs: Sequence[Sequence[str]]
    """What must be given for it to be asked: any one of these sets of files."""
    options: Sequence[str] = ()
    """Which further fields of an exam's settings it reads, beside what every benchmark has."""
    by_split: bool = False
    """Whether `labels` are given by split."""
    answer_length: int
    """Tokens after which an answer is cut, unless the exam says otherwise."""
    right_or_wrong: bool = False
    """Whether a unit's value says that its answer is right (1) or wrong (0): answers can then be marked one by one."""
    unit_name: Callable[[Unit], str] = by_first_key
    """What a unit is known by; `Item.unit` is the same."""
    units_in_order: bool = False
    """Whether the units stand in the order of the items, so that several of one name are told apart."""
    write: Callable[[Sequence[Item], Sequence[Record]], tuple[str, str]] = as_lines
    """The answers file that `score` reads."""
    judge: Callable[[Files, Ask], None] | None = None
    """Has a judge fill the files that `score` reads; `ask` puts its tasks."""
    unscored: Callable[[Files], str | None] = lambda files: None
    """Why these files, whose answers are there, give no score yet; None where they give one."""

    def __post_init__(self) -> None:
        for name in _READ_FILES:
            if (work := getattr(self, name)) is not None:
                object.__setattr__(self, name, _Reading(self.name, work))
