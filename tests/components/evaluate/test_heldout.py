"""The held-out questions as an exam."""

from __future__ import annotations

import json
from pathlib import Path

from components.contract import open_store
from components.evaluate import EvaluateSettings
from components.evaluate.answering import BLANK, RIGHT, WRONG, Answer
from components.evaluate.heldout import open_heldout, rows_of, write_rows
from components.evaluate.settings import HELD_OUT_EXAM
from components.scoring.outcomes import files_note
from components.scoring.questions import exam_digest, read_questions, wrong_pictures
from tests.support.evaluated import COLOURS, dataset, row


def test_it_is_asked_with_the_right_a_blank_and_a_wrong_picture_and_keeps_its_digest(tmp_path: Path) -> None:
    rows = [row(f"q{number}", colour, f"{number}?", "red") for number, colour in enumerate(COLOURS)]
    store = open_store(dataset(tmp_path / "questions", rows))
    exam = open_heldout(store, EvaluateSettings(max_new_tokens=7, seed=3), tmp_path / "place")
    assert (exam.title, exam.conditions) == (HELD_OUT_EXAM, (RIGHT, BLANK, WRONG))
    assert all(
        item.wrong and item.picture and item.wrong.sha256 != item.picture.sha256 for item in exam.items
    )
    questions, _ = read_questions(store, None, 3)
    # What evaluations of earlier revisions stored: with other terms they would not be comparable.
    terms = {"benchmark": "vqa", "max_new_tokens": 7, "version": "3"}
    assert exam.digest == exam_digest(questions, wrong_pictures(questions, 3), terms)


def test_each_condition_is_scored_from_a_file_and_the_first_is_the_artifacts_own(tmp_path: Path) -> None:
    rows = [row(f"q{number}", colour, "?", "red") for number, colour in enumerate(COLOURS)]
    exam = open_heldout(open_store(dataset(tmp_path / "rows", rows)), EvaluateSettings(), tmp_path / "place")
    given = {RIGHT: "red", BLANK: "blue", WRONG: "Red."}
    answers = [
        Answer(key=f"vqa/{number}", answers=given, loss=None, tokens=None) for number in range(len(rows))
    ]
    told = rows_of(exam, answers)
    assert told[0]["correct"] == {RIGHT: True, BLANK: False, WRONG: True}
    files = write_rows(exam, told)
    assert {one: exam.benchmark.score(each).scores["exact_match"] for one, each in files.items()} == {
        RIGHT: 100.0, BLANK: 0.0, WRONG: 100.0,
    }  # fmt: skip
    assert files_note(files[RIGHT])["answers"] == "answers.jsonl"
    first = json.loads((tmp_path / "place" / "answers.jsonl").read_text().splitlines()[0])
    assert first["answers"] == given
