"""The questions of an evaluation: which ones, with which pictures, and a digest that says "the same exam"."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from components.contract.digest import sha256_of
from components.contract.manifest import parquet_in
from components.contract.store import Folder
from components.datasets.reading import DatasetFile, opened
from llava.errors import RefusedInput
from llava.text_tokenizer import IMAGE

NO_KIND = "any"
"""The kind of a question that its dataset gave none."""

_ONE_PICTURE = (
    "show one picture, and asking about another one needs two: raise shard.heldout, or give more photos"
)
_TEXT = ("id", "conversations", "kinds")


@dataclass(frozen=True)
class HeldOutQuestion:
    """One held-out question about one picture."""

    id: str
    kind: str
    question: str
    """As the user would type it, without the image slot."""
    expected: str
    image: bytes
    """The file's own bytes."""

    @property
    def picture(self) -> str:
        """Which picture it is: hex sha256 of the file."""
        return hashlib.sha256(self.image).hexdigest()


def heldout_rows(folder: Folder) -> int:
    """How many held-out rows the dataset in `folder` has; reads footers only."""
    return sum(sum(file.groups) for file in _files(folder))


def two_pictures(folder: Folder) -> None:
    """Refuse held-out rows that all show one picture; reads the pictures' names, and bytes only where all are equal."""
    names: set[str | None] = set()
    for file in _files(folder):
        for row in file.rows(["image.path"]):
            names |= {row["image"]["path"]} if row["image"] else set()
            if len(names) > 1:
                return
    questions, _ = read_questions(folder, None, 0)
    if len({question.picture for question in questions}) < 2:
        raise RefusedInput(f"{folder.uri}: its {len(questions)} held-out questions {_ONE_PICTURE}")


def read_questions(
    folder: Folder, limit: int | None, seed: int
) -> tuple[list[HeldOutQuestion], dict[str, int]]:
    """The held-out questions, `limit` of them drawn by `seed`, and the rows that are no question, by reason.

    Only the drawn rows' pictures are read. Raises `RefusedInput` when there is no question at all.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    skipped: Counter[str] = Counter()
    position = 0
    for file in _files(folder):
        for row in file.rows([*_TEXT, "width"]):
            reason = _unfit(row)
            if reason is None:
                found.append((position, row))
            else:
                skipped[reason] += 1
            position += 1
    if not found:
        why = "; ".join(f"{count} x {reason}" for reason, count in sorted(skipped.items())) or "no rows"
        raise RefusedInput(
            f"{folder.uri}/heldout: no question to ask ({why}); give a dataset whose held-out rows each hold one "
            "question about a picture and its answer"
        )
    if limit is not None and limit < len(found):
        found = sorted(random.Random(seed).sample(found, limit), key=lambda item: item[0])
    pictures = _pictures(folder, [position for position, _ in found])
    return [_question(row, image) for (_, row), image in zip(found, pictures, strict=True)], dict(skipped)


def captioned(folder: Folder) -> list[dict[str, Any]]:
    """Id, picture and captions of the held-out rows that have both; raises `RefusedInput` where there are none."""
    columns = ["id", "image", "captions"]
    rows = [row for file in _files(folder) for row in file.rows(columns) if row["image"] and row["captions"]]
    if not rows:
        raise RefusedInput(
            f"{folder.uri}/heldout: no picture with captions; give a `shard` artifact that has some"
        )
    return rows


def wrong_pictures(questions: Sequence[HeldOutQuestion], seed: int) -> list[int]:
    """For each question the index of a question about another picture.

    A derangement of the distinct pictures: all questions about one picture get the same other one, every
    picture is used, none stands for itself. Raises `RefusedInput` when all show one picture.
    """
    first: dict[str, int] = {}
    for index, question in enumerate(questions):
        first.setdefault(question.picture, index)
    if len(first) < 2:
        raise RefusedInput(f"{len(questions)} held-out questions {_ONE_PICTURE}")
    order = sorted(first)
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [first[following[question.picture]] for question in questions]


def exam_digest(questions: Sequence[HeldOutQuestion], wrong: Sequence[int], terms: dict[str, Any]) -> str:
    """Equal for two evaluations exactly when they asked the same, under the same `terms`."""
    rows = [
        [q.id, q.kind, q.question, q.expected, q.picture, questions[other].picture]
        for q, other in zip(questions, wrong, strict=True)
    ]
    return sha256_of({"questions": rows, "terms": terms})


def _files(folder: Folder) -> Iterator[DatasetFile]:
    for key in parquet_in((entry.key for entry in folder.list("heldout/")), "heldout"):
        with opened(folder, key) as file:
            yield file


def _unfit(row: dict[str, Any]) -> str | None:
    """Why a row is no question for an evaluation; None when it is one."""
    turns = row["conversations"] or []
    if [turn["from"] for turn in turns] != ["human", "gpt"]:
        return "not one question and its answer"
    if not row["width"] or IMAGE not in turns[0]["value"]:
        return "no picture"
    if turns[0]["value"].count(IMAGE) > 1:
        return "several pictures"
    return None


def _question(row: dict[str, Any], image: bytes) -> HeldOutQuestion:
    human, gpt = (turn["value"] for turn in row["conversations"])
    kind = (row["kinds"] or [None])[0] or NO_KIND
    return HeldOutQuestion(row["id"], kind, human.replace(IMAGE, "", 1).strip(), gpt, image)


def _pictures(folder: Folder, positions: Sequence[int]) -> Iterator[bytes]:
    """The pictures of the rows at `positions` (ascending, counted over all files)."""
    wanted = iter(positions)
    position, start = next(wanted, None), 0
    for file in _files(folder):
        for group, count in enumerate(file.groups):
            end = start + count
            if position is not None and position < end:
                column = file.table(group, ["image"])["image"]
                while position is not None and position < end:
                    yield column[position - start].as_py()["bytes"]
                    position = next(wanted, None)
            start = end
