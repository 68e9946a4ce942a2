"""`llava score` and `llava compare` as a user types them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.scoring.benchmarks import BENCHMARKS, Files, MissingFile, find
from llava.errors import RefusedInput
from tests.support.repository import REPOSITORY
from workflows.scores import cli

GOLDEN = REPOSITORY / "tests/components/scoring/benchmarks/golden"


def llava(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workflows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_json_is_one_object_on_standard_output_and_remarks_are_not() -> None:
    pope = GOLDEN / "pope"
    labels = [f"--labels={split}={pope / split}.jsonl" for split in ("random", "adversarial")]
    answers, questions = pope / "answers.jsonl", pope / "questions.jsonl"
    done = llava("score", "pope", "--answers", answers, "--questions", questions, *labels, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert list(found)[:4] == ["benchmark", "n", "failed", "scores"]
    assert found["scores"]["mean_f1"] == 75.0
    assert found["intervals"]["random"]["f1"][0] <= 50.0 <= found["intervals"]["random"]["f1"][1]
    assert "1 answers hold no word" in done.stderr


def test_too_many_failed_judgements_are_status_2_and_no_number() -> None:
    bench = GOLDEN / "llava-bench"
    done = llava("score", "llava-bench", "--reviews", bench / "run1.jsonl", "--max-failed", "0.1", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "4 of 8 judgements failed (50.0 %), the limit is 10 %" in done.stderr


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    done = llava("score", "vqa2", "--answers", "x")
    assert done.returncode == 2
    assert (
        "'vqa2' is none of vqa, pope, scienceqa, llava-bench, captions, mme, mmbench, mm-vet" in done.stderr
    )


def test_compare_says_what_changed_and_writes_it_with_pictures(tmp_path: Path) -> None:
    science = GOLDEN / "scienceqa"
    rows = [json.loads(line) for line in (science / "answers.jsonl").read_text().splitlines()]
    better = [row | {"text": "C"} if row["question_id"] == "16" else row for row in rows]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in better))
    (tmp_path / "images" / "16").mkdir(parents=True)
    Image.new("RGB", (640, 480), "red").save(tmp_path / "images" / "16" / "image.png")
    done = llava(
        "compare", "scienceqa", science / "answers.jsonl", tmp_path / "new.jsonl", "--labels",
        science / "problems.json", "--splits", science / "pid_splits.json", "--floor", "SOC=60", "--images",
        tmp_path / "images", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (found["wins"], found["ties"], found["losses"]) == (1, 7, 0)
    assert found["differences"]["average"]["difference"] == 12.5
    assert found["changed"][0]["id"][0] == "16"
    # One question of eight: the interval touches zero, so the gate stays shut.
    assert not found["promote"]
    assert found["reason"].endswith("equal within noise")
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "| ![](pictures/scienceqa-16_image.jpg) | Question 16? | C | D | C |" in page
    with Image.open(tmp_path / "out" / "pictures" / "scienceqa-16_image.jpg") as small:
        assert small.size == (320, 240)


def test_options_that_the_benchmark_does_not_take_are_refused_in_one_message() -> None:
    vqa = GOLDEN / "vqa"
    done = llava(
        "score", "vqa", "--answers", vqa / "answers.jsonl", "--labels", vqa / "annotations.json",
        "--reviews", "/nor/this", "--judge-swap",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "vqa takes no --reviews, --judge-swap; it takes --answers, --questions, --labels" in done.stderr


@pytest.mark.parametrize(
    ("benchmark", "given", "message"),
    [
        ("vqa", {"judge": "m", "reviews": [Path("r")]}, r"^vqa takes no --reviews, --judge; it takes "),
        ("pope", {"max_failed": 0.0, "split": "test"}, r"^pope takes no --split, --max-failed; it takes "),
        ("captions", {"reference": Path("r"), "judge_seconds": 60.0}, "no --reference, --judge-seconds; it takes"),
        ("llava-bench", {"judge_url": "u", "context": Path("c")}, "^--context, --judge-url: only a live judge"),
        ("scienceqa", {"partial": True, "judge_seconds": 9.0},
         "^scienceqa takes no --partial; it takes .*; --judge-seconds: only a live judge"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(benchmark: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedInput, match=message):
        cli.score(benchmark, answers=Path("a"), **given)


def test_options_at_their_default_are_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    science = GOLDEN / "scienceqa"
    cli.score("scienceqa", answers=science / "answers.jsonl", labels=[str(science / "problems.json")],
              splits=science / "pid_splits.json", json_=True)  # fmt: skip
    assert json.loads(capsys.readouterr().out)["n"] == 8


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_what_a_benchmark_takes_are_fields_that_the_command_has(benchmark: str) -> None:
    fields = {one.name for one in dataclasses.fields(Files)}
    known = find(benchmark)
    assert {*known.reads, *known.judge_reads} <= fields
    assert not set(known.reads) & set(known.judge_reads)
    assert not known.judge_reads or known.judge


def test_compare_refuses_foreign_options_by_the_names_that_it_has() -> None:
    with pytest.raises(RefusedInput) as refused:
        cli.compare(["vqa", "a", "b"], splits=Path("s"), base_reviews=[Path("r")], new_reviews=[Path("r")])
    assert str(refused.value) == (
        "vqa takes no --splits, --base-reviews, --new-reviews; it takes --questions, --labels"
    )


@pytest.mark.parametrize(
    ("given", "lacks"), [({}, "--base-reviews"), ({"base_reviews": "run1"}, "--new-reviews")]
)
def test_compare_names_what_is_missing_as_it_is_typed(given: dict[str, str], lacks: str) -> None:
    bench = GOLDEN / "llava-bench"
    reviews = {name: [bench / f"{file}.jsonl"] for name, file in given.items()}
    with pytest.raises(MissingFile, match=f"^{lacks} is missing"):
        cli.compare(["llava-bench", str(bench / "answers.jsonl"), str(bench / "answers.jsonl")], **reviews)


def test_compare_of_models_refuses_the_options_of_files(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedInput, match=r"^--labels, --base-reviews, --images: belongs to BENCHMARK BASE NEW"
    ):
        cli.compare(
            ["runs/a", "runs/b"], root=str(tmp_path), labels=["l"], base_reviews=[Path("r")], images=tmp_path
        )
    assert not list(tmp_path.iterdir())
