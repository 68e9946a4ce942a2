"""`llava score` and `llava compare` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.repository import REPOSITORY

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
