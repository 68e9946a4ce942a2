"""An exam: what it is made from, its digest, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.contract import sha256_of
from components.evaluate import EvaluateSettings, ExamSettings, exams
from components.evaluate.answering import BLANK, RIGHT
from components.evaluate.judge_run import reviewed
from components.scoring.benchmarks import MissingFile, find
from llava.data.jsonl import to_jsonl
from llava.errors import RefusedInput
from tests.support.evaluated import Given, GivenSettings, Row, dataset, picture


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        (0, {"labels": {"random": "LABELS"}}, r"questions without a label file: 12 of adversarial"),
        (0, {"images": "."}, r"images: no picture shapes-.*png in .*; name the folder that has it"),
        (0, {"questions": "nowhere.jsonl"}, r"nowhere\.jsonl: .*give the path of a file"),
        (2, {"labels": "OTHER"}, r"answers belong to none of the questions|questions have no answers"),
        (3, {"data": "."}, r"neither a LLaVA-format JSON or JSONL nor a finished dataset artifact"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_asked(
    entries: list[dict[str, Any]], entry: int, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    known = {"LABELS": entries[0]["labels"]["random"], "OTHER": entries[3]["data"]}
    if "labels" in change:
        labels = change["labels"]
        change = {"labels": known[labels] if isinstance(labels, str) else {"random": known[labels["random"]]}}
    with pytest.raises(RefusedInput, match=message):
        exams.open_exam(ExamSettings(**entries[entry] | change), tmp_path / "exam")


def test_another_judge_is_another_exam_and_without_one_the_exam_is_what_it_always_was(tmp_path: Path) -> None:
    row = {"question_id": 1, "text": "What?", "category": "conv"}
    (tmp_path / "rows.jsonl").write_bytes(to_jsonl([row]))
    files = dict.fromkeys(("questions", "reference", "context"), str(tmp_path / "rows.jsonl"))
    places = iter(range(99))

    def digest(**given: Any) -> str:
        settings = ExamSettings(benchmark="llava-bench", **files, **given)
        return exams.open_exam(settings, tmp_path / f"{next(places)}").digest

    judge = {"model": "j", "url": "http://127.0.0.1/v1"}
    asked = [["What?", None, {"question_id": 1, "metadata": {"category": "conv"}}]]
    labels = {f"{name}.jsonl": sha256_of(json.dumps(row) + "\n") for name in files}
    terms = {"benchmark": "llava-bench", "max_new_tokens": 1024}
    assert digest() == sha256_of({"asked": asked, "labels": labels, "terms": terms})
    judged = [
        digest(judge=judge | changed, **others)
        for changed, others in (
            ({}, {}), ({"model": "k"}, {}), ({"temperature": 1.0}, {}), ({"max_tokens": 9}, {}),
            ({}, {"judge_runs": 2}), ({}, {"judge_runs": 2, "judge_swap": True}),
        )
    ]  # fmt: skip
    assert len({digest(), *judged}) == 7
    assert digest(judge=judge | {"seconds": 1.0, "concurrency": 1}) == judged[0]


def test_a_dataset_is_a_benchmark_of_its_held_out_rows(
    run_in: Callable[..., Any], known_rows: list[Row], tmp_path: Path
) -> None:
    rows = [
        one | {"captions": ["a picture", f"a {one['image']['path'][:-4]} picture"]} for one in known_rows[:6]
    ]
    uri = run_in(Given("shard", dataset(tmp_path / "rows", rows)), GivenSettings()).artifact.uri
    asked = exams.open_exam(ExamSettings(benchmark="vqa", data=uri), tmp_path / "vqa")
    assert [item.prompt for item in asked.items] == [f"Which is number {number}?" for number in range(6)]
    told = exams.open_exam(ExamSettings(benchmark="captions", data=uri), tmp_path / "captions")
    scored = find("captions").score(exams.answered(told, ["a red picture"] * 6, "m"))
    assert scored.n == 6
    assert scored.units[0].expected == "a picture / a red picture"
    assert [item.picture.sha256 for item in told.items if item.picture] == [
        item.picture.sha256 for item in asked.items if item.picture
    ]


class Kept:
    """A job's folder that keeps nothing yet."""

    def fetch(self, key: str) -> None:
        return None


def rows_in(folder: Path, **files: list[dict[str, Any]]) -> dict[str, str]:
    """Each as a JSONL file; by name, where it lies."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_bytes(to_jsonl(rows))
    return {name: str(folder / f"{name}.jsonl") for name in files}


@pytest.mark.parametrize(
    ("given", "name", "content", "message"),
    [
        ({"benchmark": "vqa"}, "data.json", '{"a": ', "line 1 is no JSON"),
        ({"benchmark": "vqa"}, "data.json", '[{"conversations": [{}]}]', "no 'id' in the row"),
        ({"benchmark": "captions"}, "data.json", '[{"id": 1, "conversations": []}]', "has 0 answers"),
        ({"benchmark": "captions"}, "data.json", '[{"id": 1, "conversations": [{}]}]', "no 'from' in the row"),
        ({"benchmark": "scienceqa"}, "labels.json", '{"1": {}}', "no 'choices' in the row"),
        ({"benchmark": "mm-vet"}, "labels.json", "[]", "holds a list, not a JSON object"),
        ({"benchmark": "mmbench"}, "labels.tsv", "index\tquestion\nx\ty\n", "have no number as index"),
    ],
)  # fmt: skip
def test_a_message_names_the_users_own_file_and_never_a_copy(
    given: dict[str, Any], name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(content)
    own = str(tmp_path / "mine" / name)
    with pytest.raises(RefusedInput, match=message) as refused:
        exams.open_exam(ExamSettings(**given, **{name.partition(".")[0]: own}), tmp_path / "copies")
    assert own in str(refused.value)
    assert "copies" not in str(refused.value)


def test_questions_that_the_labels_do_not_know_are_told_by_the_users_own_files(tmp_path: Path) -> None:
    files = rows_in(
        tmp_path / "mine",
        questions=[{"question_id": 1, "text": "What?"}],
        labels=[{"question_id": 2, "answer": "x"}],
    )
    with pytest.raises(RefusedInput) as refused:
        exams.open_exam(ExamSettings(benchmark="vqa", **files), tmp_path / "copies")
    assert str(refused.value).startswith(f"the answers to {files['questions']}: 1 of 1 questions")
    assert "copies" not in str(refused.value)


def test_what_a_judge_lacks_is_told_by_the_users_own_file(tmp_path: Path) -> None:
    row = {"question_id": 1, "text": "What?", "category": "conv", "image": "1.png"}
    files = rows_in(tmp_path / "mine", questions=[row], reference=[row], context=[{"image": "2.png"}])
    (tmp_path / "mine" / "1.png").write_bytes(picture("red"))
    settings = ExamSettings(benchmark="llava-bench", judge={"model": "j"}, **files)
    exam = exams.open_exam(settings, tmp_path / "copies")
    answered = exams.answered(exam, ["an answer"], "m")
    with pytest.raises(RefusedInput, match="no notes on the pictures of 1 questions") as refused:
        reviewed(SimpleNamespace(folder=Kept()), exam, answered)  # type: ignore[arg-type]
    assert str(refused.value).startswith(files["context"])


def test_a_refusal_keeps_what_it_is_about(tmp_path: Path) -> None:
    row = {"question_id": 1, "text": "What?", "image": "1.png", "category": "conv"}
    files = rows_in(tmp_path / "mine", questions=[row])
    (tmp_path / "mine" / "1.png").write_bytes(picture("red"))
    settings = ExamSettings(benchmark="llava-bench", **files)
    exam = exams.open_exam(settings, tmp_path / "copies", exams.called(3))
    with pytest.raises(MissingFile, match=r"^evaluate\.benchmarks\[3\]\.reviews is missing") as missing:
        exams.score(exam, exams.answered(exam, ["an answer"], "m"))
    assert missing.value.field == "reviews"


def test_every_file_that_is_missing_is_told_by_its_key_before_any_work(tmp_path: Path) -> None:
    gone = {split: str(tmp_path / split) for split in ("random", "popular")}
    settings = EvaluateSettings(
        benchmarks=[
            {"benchmark": "captions", "labels": str(tmp_path / "captions.json")},
            {"benchmark": "pope", "questions": str(tmp_path / "questions"), "labels": gone},
        ]
    )
    told = [
        one
        for number, exam in enumerate(settings.benchmarks)
        for one in exams.preflight(exam, exams.called(number))
    ]
    assert [one.partition(": nothing lies there")[0] for one in told] == [
        f"evaluate.benchmarks[0].labels: {tmp_path / 'captions.json'}",
        f"evaluate.benchmarks[1].questions: {tmp_path / 'questions'}",
        f"evaluate.benchmarks[1].labels.random: {gone['random']}",
        f"evaluate.benchmarks[1].labels.popular: {gone['popular']}",
    ]
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_missing_is_told_before_any_work(tmp_path: Path) -> None:
    row = {"question_id": 1, "text": "What?", "image": "1.png"}
    files = rows_in(tmp_path / "mine", questions=[row], labels=[{"question_id": 1, "answer": "x"}])
    settings = ExamSettings(benchmark="vqa", **files)
    (told,) = exams.preflight(settings, exams.called(0))
    assert told.startswith("evaluate.benchmarks[0].images: no picture 1.png in ")
    (tmp_path / "mine" / "1.png").write_bytes(picture("red"))
    assert exams.preflight(settings, exams.called(0)) == []


def test_an_exam_says_under_which_conditions_it_is_asked(tmp_path: Path) -> None:
    files = rows_in(
        tmp_path / "mine",
        questions=[{"question_id": 1, "text": "What?"}],
        labels=[{"question_id": 1, "answer": "x"}],
    )
    plain = exams.open_exam(ExamSettings(benchmark="vqa", **files), tmp_path / "plain")
    blank = exams.open_exam(ExamSettings(benchmark="vqa", blank_images=True, **files), tmp_path / "blank")
    assert (plain.conditions, blank.conditions) == ((RIGHT,), (RIGHT, BLANK))
