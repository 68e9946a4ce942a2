"""Held-out questions: which rows are one, and whose picture is the wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.contract import open_store
from components.scoring.questions import (
    HeldOutQuestion,
    exam_digest,
    read_questions,
    two_pictures,
    wrong_pictures,
)
from llava.errors import RefusedInput
from tests.support.evaluated import COLOURS, QUESTIONS, dataset, picture, row


def test_held_out_rows_about_one_picture_are_refused_whatever_its_names(tmp_path: Path) -> None:
    rows = [row(name, colour, "Which?", "red", None) for name, colour in (("a", "red"), ("b", "red"))]
    with pytest.raises(
        RefusedInput, match=r"its 2 held-out questions show one picture.*raise shard\.heldout"
    ):
        two_pictures(open_store(dataset(tmp_path / "one", rows)))
    rows.append(row("c", "blue", "Which?", "blue", None))
    two_pictures(open_store(dataset(tmp_path / "two", rows)))


def test_rows_that_are_no_question_are_counted_by_reason(tmp_path: Path) -> None:
    good = row("good", "red", "Which?", "red", None)
    talk = row("talk", "red", "Which?", "red")
    talk["conversations"] = talk["conversations"] * 2
    text = row("text", "red", "Which?", "red") | {"image": None, "width": 0, "height": 0}
    folder = open_store(dataset(tmp_path / "mixed", [text, good, talk]))
    questions, skipped = read_questions(folder, None, 0)
    assert [(q.id, q.kind, q.question, q.expected) for q in questions] == [("good", "any", "Which?", "red")]
    assert questions[0].image == picture("red")
    assert skipped == {"no picture": 1, "not one question and its answer": 1}
    with pytest.raises(RefusedInput, match="1 x no picture"):
        read_questions(open_store(dataset(tmp_path / "texts", [text])), None, 0)


def test_a_limit_draws_the_same_questions_with_their_own_pictures_each_time(tmp_path: Path) -> None:
    rows = [
        row(f"q{number:03d}", COLOURS[number % len(COLOURS)], f"Which is number {number}?", "x")
        for number in range(QUESTIONS)
    ]
    folder = open_store(dataset(tmp_path / "questions", rows))
    first, _ = read_questions(folder, 20, 5)
    again, _ = read_questions(folder, 20, 5)
    other, _ = read_questions(folder, 20, 6)
    assert first == again != other
    assert len(first) == 20
    own = {row["id"]: row["image"]["bytes"] for row in rows}
    assert all(question.image == own[question.id] for question in first)


@pytest.mark.parametrize("seed", range(20))
def test_the_wrong_picture_is_never_the_same_picture(seed: int) -> None:
    shown = ["a", "b", "a", "c", "b", "a", "d", "d"]
    questions = [HeldOutQuestion(f"{n}", "k", "q", "e", image.encode()) for n, image in enumerate(shown)]
    wrong = wrong_pictures(questions, seed)
    assert all(shown[other] != own for own, other in zip(shown, wrong, strict=True))
    assert {shown[other] for other in wrong} == set(shown)


def test_one_picture_cannot_be_deranged() -> None:
    with pytest.raises(RefusedInput, match="needs two"):
        wrong_pictures([HeldOutQuestion(name, "k", "q", "e", b"same") for name in "ab"], 0)


def test_the_exam_is_another_one_when_anything_that_was_asked_differs() -> None:
    def exam(image: bytes = b"a", text: str = "q", order: int = 0, tokens: int = 6) -> str:
        questions = [
            HeldOutQuestion("1", "k", text, "e", image),
            *(HeldOutQuestion(n, "k", "q", "e", n.encode()) for n in "xyz"),
        ]
        wrong = wrong_pictures(questions, order)
        return exam_digest(questions, wrong, {"max_new_tokens": tokens})

    assert exam() == exam()
    orders = {exam(order=seed) for seed in range(12)}
    assert len(orders) > 1
    assert len({exam(), exam(image=b"b"), exam(text="p"), exam(tokens=7)}) == 4
