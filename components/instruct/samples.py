"""From a photo's row to its samples by the rules teacher: types by their shares, no sample twice.

Everything depends on the settings and on the photo's row alone (the seed and the photo's id make the random
numbers), so the same row gives the same samples in any shard, in any order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from components.datasets.tasks import ShardOutput
from components.instruct.settings import InstructSettings
from components.rule_teacher import rules
from components.rule_teacher.rules import Turn
from llava.data.schema import Row, TurnCell

SLOT = "<image>"
QUESTIONS_ASKED = 8  # of a held-out photo, to choose from
OPEN_KINDS = ("brief",)  # any of many answers would do, so that none can be compared

Objects = list[tuple[str, tuple[float, float, float, float]]]


@dataclass(frozen=True)
class WrittenQuestion:
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
                    "conversations": cells(turns, after=picture_after(settings, rng)),
                    "kinds": [turn.kind for turn in turns],
                    "type": kind,
                }
                break


def questions(row: Row, photo: int, settings: InstructSettings) -> list[WrittenQuestion]:
    """Single questions about a held-out photo whose answer can be compared.

    A row that has conversations already gives its first pair of turns.
    """
    if row["conversations"]:
        first, answer = row["conversations"][:2]
        return [WrittenQuestion(photo, 0, (row["kinds"] or [""])[0], (first, answer))]
    rng = random.Random(f"instruct held out {settings.seed} {row['id']}")
    turns = rules.conversation(*_known(row), rng, QUESTIONS_ASKED, settings.kinds)
    return [
        WrittenQuestion(photo, number, turn.kind, (asked, told))
        for number, turn in enumerate(turns)
        if turn.kind not in OPEN_KINDS
        for asked, told in [cells([turn], after=False)]
    ]


def spread_over_kinds(candidates: Sequence[WrittenQuestion], count: int, seed: int) -> list[WrittenQuestion]:
    """`count` of the candidates, as evenly over their kinds as they allow, in the order of the photos."""
    rng = random.Random(f"instruct choice {seed}")
    by_kind: dict[str, list[WrittenQuestion]] = {}
    for question in candidates:
        by_kind.setdefault(question.kind, []).append(question)
    for found in by_kind.values():
        rng.shuffle(found)
    chosen: list[WrittenQuestion] = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in sorted(by_kind):
            if by_kind[kind] and len(chosen) < count:
                chosen.append(by_kind[kind].pop())
    return sorted(chosen, key=lambda question: (question.photo, question.number))


def heldout_row(row: Row, question: WrittenQuestion) -> Row:
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
    if kind == "conversation":
        return rules.conversation(*_known(row), rng, settings.turns, settings.kinds)
    turn = (rules.detail if kind == "detail" else rules.reasoning)(*_known(row), rng)
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


def picture_after(settings: InstructSettings, rng: random.Random) -> bool:
    """Whether the picture stands after the first question."""
    return settings.image_position == "random" and rng.random() < 0.5


def cells(turns: Sequence[Turn], after: bool) -> list[TurnCell]:
    """Turns as a dataset holds them; the picture stands before or after the first question."""
    made: list[TurnCell] = []
    for number, turn in enumerate(turns):
        question = turn.question
        if number == 0:
            question = f"{question}\n{SLOT}" if after else f"{SLOT}\n{question}"
        made += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    return made


def measure(output: ShardOutput, split: str, sample: Row) -> None:
    """Count a sample for the report."""
    turns = sample["conversations"] or []
    output.count(f"type, {split}/{sample['type'] or 'as given'}")
    for kind in sample["kinds"] or []:
        output.count(f"kind, {split}/{kind}")
    output.measure(f"turns, {split}", len(turns))
    for turn in turns:
        if turn["from"] == "human":
            words = turn["value"].replace(SLOT, " ").split()
            output.count(f"first words, {split}/{' '.join(words[:2])}")
        else:
            output.measure(f"answer words, {split}", len(turn["value"].split()))
