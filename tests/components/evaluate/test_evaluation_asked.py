"""MME, MMBench, MM-Vet and a benchmark that only this test knows, asked in one evaluation of a small model."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.contract import Artifact
from components.evaluate import Evaluate, EvaluateSettings
from components.scoring.base import Files, MissingFile, Record, Scored, Unit, read_rows, same_rows
from components.scoring.benchmarks import BENCHMARKS, Benchmark, find
from components.scoring.benchmarks.reading import Item, Paper, from_questions
from components.scoring.bootstrap import Floats
from components.scoring.gate import GateSettings, decide
from components.scoring.outcomes import comparable, outcomes
from llava.data.jsonl import to_jsonl
from llava.errors import RefusedInput
from tests.support.evaluated import Given, GivenSettings, Row, dataset, picture
from workflows.summary import show
from workflows.train import Summary

MME = {
    "existence": ("Is there a red picture? Please answer yes or no.", "Is there a dog? Please answer yes or no."),
    "count": ("Is there one picture? Please answer yes or no.", "Are there nine? Please answer yes or no."),
}  # fmt: skip


def mme(folder: Path) -> Row:
    """MME's own folder, where pictures lie beside their right answers, and its questions."""
    rows = []
    for subtask, (right, wrong) in MME.items():
        (folder / "answers" / subtask).mkdir(parents=True)
        (folder / "answers" / subtask / "1.txt").write_text(f"{right}\tYes\n{wrong}\tNo\n")
        (folder / "answers" / subtask / "1.png").write_bytes(picture("red"))
        rows += [
            {"question_id": f"{subtask}/1.png", "image": f"{subtask}/1.png", "text": text}
            for text in (right, wrong)
        ]
    (folder / "questions.jsonl").write_bytes(to_jsonl(rows))
    return {
        "benchmark": "mme",
        "images": str(folder / "answers"),
        "questions": str(folder / "questions.jsonl"),
        "labels": str(folder / "answers"),
        "blank_images": True,
    }


def mmbench(folder: Path) -> Row:
    """MMBench's table, its pictures inside; the last row is a rotation of the first, as later files hold them."""
    image = base64.b64encode(picture("blue")).decode()
    heads = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        ["1", "What colour?", "nan", "blue", "red", "green", "", "A", "x", image],
        ["2", "Which?", "Look.", "yes", "no", "", "", "B", "x", image],
        ["1000001", "What colour?", "nan", "red", "green", "blue", "", "C", "x", image],
    ]
    folder.mkdir()
    (folder / "table.tsv").write_text("".join("\t".join(row) + "\n" for row in [heads, *rows]))
    return {"benchmark": "mmbench", "labels": str(folder / "table.tsv")}


def mm_vet(folder: Path) -> Row:
    """MM-Vet's questions by id."""
    folder.mkdir()
    (folder / "v1_0.png").write_bytes(picture("green"))
    rows = {
        f"v1_{number}": {
            "imagename": "v1_0.png",
            "question": f"{number}?",
            "answer": "x",
            "capability": ["ocr"],
        }
        for number in range(2)
    }
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    return {"benchmark": "mm-vet", "labels": str(folder / "mm-vet.json")}


def toy(folder: Path) -> Row:
    """A benchmark whose right answers are numbers."""
    folder.mkdir()
    (folder / "1.png").write_bytes(picture("white"))
    rows = [{"question_id": number, "image": "1.png", "text": f"{number}?"} for number in range(3)]
    (folder / "questions.jsonl").write_bytes(to_jsonl(rows))
    (folder / "labels.jsonl").write_bytes(
        to_jsonl([{"question_id": number, "longest": 999} for number in range(3)])
    )
    return {
        "benchmark": "toy",
        "questions": str(folder / "questions.jsonl"),
        "labels": str(folder / "labels.jsonl"),
        "blank_images": True,
    }


def _toy_prompt(row: Record) -> str:
    return f"{row['text']}\nSay little."


def _toy_gather(paper: Paper) -> tuple[list[Item], Files]:
    return from_questions(paper, _toy_prompt), paper.files(labels=paper.labels)


def _toy_score(files: Files) -> Scored:
    """`brief`: the share of answers that are no longer than their label allows, between 0 and 1."""
    path, labels = files.need("answers", "the answers"), read_rows(files.truth("the longest answers"))
    rows = read_rows(path)
    same_rows([one["question_id"] for one in labels], [one["question_id"] for one in rows], str(path),
              "answer", "questions")  # fmt: skip
    allowed = {one["question_id"]: one["longest"] for one in labels}
    units = [
        Unit((row["question_id"], allowed[row["question_id"]]), row["prompt"], str(allowed[row["question_id"]]),
             row["text"], float(len(row["text"]) <= allowed[row["question_id"]]))
        for row in rows
    ]  # fmt: skip

    def formula(sums: Floats) -> dict[str, Floats]:
        return {"brief": sums[..., 1] / sums[..., 0]}

    return Scored("toy", units, np.array([[1.0, unit.value] for unit in units]), formula, len(units))


TOY = Benchmark(
    name="toy",
    reads={"answers": "JSONL", "labels": "JSONL of question_id, longest"},
    score=_toy_score,
    prompt=_toy_prompt,
    headline="brief",
    unit="of 1",
    digits=4,
    times=100.0,
    gather=_toy_gather,
    needs=[["questions", "labels"]],
    answer_length=3,
    right_or_wrong=True,
)


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """The one line that the toy adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BENCHMARKS, "toy", TOY)
        yield


@pytest.fixture(scope="module")
def asked(
    run_at: Callable[..., Any],
    model_folder: Path,
    known_rows: list[Row],
    tmp_path_factory: pytest.TempPathFactory,
    table: None,
) -> Artifact:
    """One evaluation for all tests of this module."""
    folder = tmp_path_factory.mktemp("asked")
    entries = [make(folder / make.__name__) for make in (mme, mmbench, mm_vet, toy)]
    root = folder / "root"
    questions = run_at(
        root, Given("instruct", dataset(folder / "rows", known_rows)), GivenSettings()
    ).artifact
    model = run_at(root, Given("finetune", model_folder), GivenSettings()).artifact
    settings = EvaluateSettings(
        limit=2, max_new_tokens=2, contamination="off",
        benchmarks=[one if one["benchmark"] == "toy" else one | {"max_new_tokens": 6} for one in entries],
    )  # fmt: skip
    found = run_at(root, Evaluate(), settings, {"model": model, "questions": questions}).artifact
    assert isinstance(found, Artifact)
    return found


def lines(artifact: Artifact, name: str, prefix: str = "") -> list[Row]:
    return read_rows(artifact.local() / "exams" / name / f"{prefix}answers.jsonl")


def test_mme_is_asked_in_its_own_words_and_scored_in_points(asked: Artifact) -> None:
    rows = lines(asked, "mme")
    assert [(row["question_id"], row["prompt"]) for row in rows] == [
        (f"{subtask}/1.png", text) for subtask, texts in MME.items() for text in texts
    ]
    note, folder = asked.manifest.notes["exams"]["mme"], asked.local() / "exams" / "mme"
    again = find("mme").score(Files(answers=folder / "answers.jsonl", labels={"": folder / "labels"}))
    assert note["scores"]["perception"] == again.scores["perception"]
    assert asked.manifest.metrics["eval/mme/perception"] == again.scores["perception"]
    assert "eval/mme/blank_image/perception" in asked.manifest.metrics
    assert note["n"] == 4
    assert not [path for path in folder.rglob("*") if path.suffix == ".png"]


def test_mmbench_is_asked_once_per_rotation_and_a_question_counts_with_all_of_them(
    asked: Artifact, tmp_path: Path
) -> None:
    rows = lines(asked, "mmbench")
    assert [(row["question_id"], row["round_id"]) for row in rows] == [
        ("1", 0), ("1", 1), ("1", 2), ("2", 0), ("2", 1)
    ]  # fmt: skip
    assert rows[1]["options"] == ["red", "green", "blue"] and rows[1]["option_char"] == ["B", "C", "A"]
    assert rows[1]["prompt"].splitlines()[1:4] == ["A. red", "B. green", "C. blue"]
    assert rows[3]["prompt"].startswith("Look.\nWhich?\nA. yes\nB. no\n")
    folder = asked.local() / "exams" / "mmbench"
    for row in rows:
        # The letter under which the right option was shown.
        row["text"] = "ABC"[row["option_char"].index("A" if row["question_id"] == "1" else "B")]
    right = tmp_path / "right.jsonl"
    right.write_bytes(to_jsonl(rows))
    scores = find("mmbench").score(Files(answers=right, labels={"": folder / "labels.tsv"})).scores
    assert scores == {"accuracy": 100.0, "circular": 100.0}
    assert asked.manifest.notes["exams"]["mmbench"]["scores"]["circular"] is not None


def test_mm_vet_is_answered_as_its_grader_reads_it_and_scored_with_its_grades(
    asked: Artifact, tmp_path: Path
) -> None:
    note, folder = asked.manifest.notes["exams"]["mm-vet"], asked.local() / "exams" / "mm-vet"
    answers = json.loads((folder / "answers.json").read_text())
    assert list(answers) == ["v1_0", "v1_1"] and all(isinstance(text, str) for text in answers.values())
    assert note["scores"] == {} and "mm-vet" not in outcomes(asked)
    assert "mm-vet: answered and not scored, since MM-Vet's grader has not graded them" in (
        asked.local() / "report.md"
    ).read_text().replace("\\", "")
    grades = tmp_path / "grades.json"
    grades.write_text(json.dumps({"v1_0": {"score": [1.0]}, "v1_1": {"score": [0.5]}}))
    graded = Files(folder / "answers.json", labels={"": folder / "labels.json"}, reviews=[grades])
    assert find("mm-vet").score(graded).scores["total"] == 75.0


def test_a_benchmark_of_one_line_is_asked_scored_and_reported(
    asked: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines(asked, "toy")
    assert [row["prompt"] for row in rows] == [f"{number}?\nSay little." for number in range(3)]
    note = asked.manifest.notes["exams"]["toy"]
    assert note["scores"] == {"brief": 1.0} and note["n"] == 3
    assert asked.manifest.metrics["eval/toy/brief"] == 1.0
    assert asked.manifest.metrics["eval/toy/blank_image/brief"] == 1.0
    report = (asked.local() / "report.md").read_text()
    assert "| toy/brief | 3 | 1.0000 (1.0000 to 1.0000) |" in report
    assert any(line.startswith("| toy |") and "✓" in line for line in report.splitlines())
    workspace: Any = None
    show(Summary({"evaluate": asked.uri}, dict(asked.manifest.metrics), seconds={"evaluate": 1.0}), workspace)
    told = {
        name: value for name, *value in map(str.split, filter(None, capsys.readouterr().err.splitlines()))
    }
    assert told["eval/toy/brief"] == ["1.0000", "of", "1"]
    assert told["eval/mme/perception"][-1] == "points"


def test_a_benchmark_of_one_line_decides_at_the_gate(asked: Artifact) -> None:
    base, new = comparable(asked, asked, ["toy"])
    verdict = decide(GateSettings(benchmarks=("toy/brief",), draws=100), base, new)
    assert not verdict.promote and verdict.reason.startswith("toy/brief 1.00 against 1.00")
    with pytest.raises(RefusedInput, match=r"'toy/long', which was not measured; known: .*toy/brief"):
        decide(GateSettings(benchmarks=("toy/long",)), base, new)


def test_a_benchmark_of_one_line_refuses_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="toy: give questions and labels"):
        EvaluateSettings(benchmarks=[{"benchmark": "toy", "questions": "q"}])
    with pytest.raises(ValueError, match=r"known: vqa, .*toy"):
        EvaluateSettings(benchmarks=[{"benchmark": "tot", "questions": "q"}])
    with pytest.raises(MissingFile, match="LABELS is missing: the longest answers") as missing:
        _toy_score(Files(answers=Path("x"), called=str.upper))
    assert missing.value.field == "labels"
