"""From a photo's row to its samples: types by their shares, turns from the teacher, no sample twice.

Everything depends on the settings and on the photo's row alone (the seed and the photo's id make the random
numbers), so the same row gives the same samples in any shard, in any order.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from components.instruct import rules
from components.instruct.rules import Turn
from components.instruct.settings import InstructSettings
from llava.data.schema import Row, TurnCell

SLOT = "<image>"
QUESTIONS_ASKED = 8  # of a held-out photo, to choose from
OPEN_KINDS = ("brief",)  # any of many answers would do, so that none can be compared

Objects = list[tuple[str, tuple[float, float, float, float]]]


class Teacher(Protocol):
    """Writes about a picture that it knows from captions and boxes only. `objects` None: unknown."""

    def conversation(
        self,
        captions: Sequence[str],
        objects: Objects | None,
        width: int,
        height: int,
        rng: random.Random,
        turns: int,
        kinds: Collection[str] | None = None,
    ) -> list[Turn]:
        """Up to `turns` short questions with their answers."""

    def detail(
        self, captions: Sequence[str], objects: Objects | None, width: int, height: int, rng: random.Random
    ) -> Turn | None:
        """A request for a description, and the description; None where too little is known."""

    def reasoning(
        self, captions: Sequence[str], objects: Objects | None, width: int, height: int, rng: random.Random
    ) -> Turn | None:
        """A question that takes more than one step, and its answer; None where too little is known."""


TEACHERS: dict[str, Teacher] = {"rules": rules}


@dataclass(frozen=True)
class Question:
    """One held-out question about photo number `photo`; `kind` is "" where nobody said."""

    photo: int
    number: int
    kind: str
    turns: tuple[TurnCell, TurnCell]


def samples(row: Row, settings: InstructSettings) -> Iterator[Row]:
    """Training samples about one photo; a row that has conversations already is passed on as it is."""
    if row["conversations"]:
        yield row
        return
    seen: set[tuple[str, ...]] = set()
    for number in range(settings.per_photo):
        rng = random.Random(f"instruct {settings.seed} {row['id']} {number}")
        for kind in _in_random_order(settings.shares, rng):
            turns = _write(kind, row, settings, rng)
            said = tuple(text for turn in turns for text in (turn.question, turn.answer))
            if said and said not in seen:
                seen.add(said)
                yield row | {
                    "id": f"{row['id']}-{number}",
                    "conversations": _cells(turns, after=_after(settings, rng)),
                    "kinds": [turn.kind for turn in turns],
                    "type": kind,
                }
                break


def questions(row: Row, photo: int, settings: InstructSettings) -> list[Question]:
    """Single questions about a held-out photo whose answer can be compared.

    A row that has conversations already gives its first pair of turns.
    """
    if row["conversations"]:
        first, answer = row["conversations"][:2]
        return [Question(photo, 0, (row["kinds"] or [""])[0], (first, answer))]
    rng = random.Random(f"instruct held out {settings.seed} {row['id']}")
    turns = TEACHERS[settings.teacher].conversation(*_known(row), rng, QUESTIONS_ASKED, settings.kinds)
    return [
        Question(photo, number, turn.kind, (cells[0], cells[1]))
        for number, turn in enumerate(turns)
        if turn.kind not in OPEN_KINDS
        for cells in [_cells([turn], after=False)]
    ]


def spread_over_kinds(candidates: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` of the candidates, as evenly over their kinds as they allow, in the order of the photos."""
    rng = random.Random(f"instruct choice {seed}")
    by_kind: dict[str, list[Question]] = {}
    for question in candidates:
        by_kind.setdefault(question.kind, []).append(question)
    for found in by_kind.values():
        rng.shuffle(found)
    chosen: list[Question] = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in sorted(by_kind):
            if by_kind[kind] and len(chosen) < count:
                chosen.append(by_kind[kind].pop())
    return sorted(chosen, key=lambda question: (question.photo, question.number))


def heldout_row(row: Row, question: Question) -> Row:
    """The row of one held-out question."""
    if row["conversations"]:
        return row | {
            "conversations": list(question.turns),
            "kinds": [question.kind] if question.kind else None,
        }
    return row | {
        "id": f"{row['id']}-q{question.number}",
        "conversations": list(question.turns),
        "kinds": [question.kind],
        "type": "conversation",
    }


def _write(kind: str, row: Row, settings: InstructSettings, rng: random.Random) -> list[Turn]:
    teacher = TEACHERS[settings.teacher]
    if kind == "conversation":
        return teacher.conversation(*_known(row), rng, settings.turns, settings.kinds)
    turn = (teacher.detail if kind == "detail" else teacher.reasoning)(*_known(row), rng)
    return [turn] if turn is not None else []


def _known(row: Row) -> tuple[list[str], Objects | None, int, int]:
    objects: Objects | None = None
    if row["objects"] is not None:
        objects = [(one["category"], _box(one["bbox"])) for one in row["objects"]]
    return row["captions"], objects, row["width"], row["height"]


def _box(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = bbox
    return x, y, width, height


def _in_random_order(shares: dict[str, float], rng: random.Random) -> Iterator[str]:
    """The types by weight without repetition: the first is the draw, the others stand in for it."""
    left = {kind: share for kind, share in shares.items() if share > 0}
    while left:
        kind = rng.choices(list(left), weights=list(left.values()))[0]
        del left[kind]
        yield kind


def _after(settings: InstructSettings, rng: random.Random) -> bool:
    return settings.image_position == "random" and rng.random() < 0.5


def _cells(turns: Sequence[Turn], after: bool) -> list[TurnCell]:
    cells: list[TurnCell] = []
    for number, turn in enumerate(turns):
        question = turn.question
        if number == 0:
            question = f"{question}\n{SLOT}" if after else f"{SLOT}\n{question}"
        cells += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    return cells
