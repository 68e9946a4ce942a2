"""A live judge over a real socket that fails in every way; what it says is stored, read again and scored."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from components.contract import (
    Artifact,
    Component,
    Job,
    Settings,
    Tracking,
    Workspace,
    open_store,
    run_component,
)
from components.evaluate import ExamSettings
from components.evaluate.answering import RIGHT
from components.evaluate.exams import Exam
from components.evaluate.judge_run import reviewed
from components.scoring import judge as judging
from components.scoring.base import read_rows
from components.scoring.benchmarks import Files, find, llava_bench
from components.scoring.judge import JudgeSettings, JudgeTask
from llava.errors import RefusedInput
from tests.support.judge_endpoint import Endpoint, Reply, said
from tests.support.repository import REPOSITORY
from workflows.scores.score import run_judge

pytest.importorskip("openai")


def settings(endpoint: Endpoint, **given: Any) -> JudgeSettings:
    return JudgeSettings(
        **({"model": "j", "url": endpoint.url, "seconds": 0.5, "tries": 2, "pause": 0.05} | given)
    )


FAILURES: dict[str, list[Reply]] = {
    "time-out": [(200, "8 9", 5.0)],
    "server error": [(500, None, 0.0)],
    "rate limit": [(429, None, 0.0)],
    "bad request": [(400, None, 0.0)],
    "refusal": said({"role": "assistant", "content": None, "refusal": "I will not."}),
    "three marks": said("8 9 10"),
    "fractions": said("8/10 and 9/10"),
    "prose first": said("Both are good.\n8 9"),
    "negative": said("-3 8"),
    "eleven": said("11 9"),
    "decimal comma": said("8,5 9,5"),
    "empty": said(""),
    "cut connection": [(0, None, 0.0)],
    "half an answer": said(b'{"choices": [{"message": {"content": "8 9'),
    "a page": said(b"<html>8 9</html>"),
    "choices no list": said(b'{"choices": {"message": {"content": "8 9"}}}'),
    "no choices": said(b'{"choices": null}'),
    "no object": said(b"[]"),
    "parts": said({"role": "assistant", "content": [{"type": "text", "text": "8 9"}]}),
    "half a letter": said("8 9 \ud83d"),
}
GOOD = {"good": said("8 6\nBecause."), "comma": said("10, 9"), "retried": said("What?", "6 6\nNow.")}


def test_every_kind_of_failure_is_counted_and_the_score_is_that_of_the_rest(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.replies = FAILURES | GOOD
    tasks = [
        JudgeTask({"question_id": name, "category": "detail"}, f"Judge [{name}]") for name in endpoint.replies
    ]
    path = tmp_path / "reviews.jsonl"
    tally = judging.judge(settings(endpoint, seconds=1.5), tasks, path, llava_bench.parse, "tuple")
    assert (tally.judged, tally.failed, tally.retried) == (23, 20, 21)
    rows = {row["question_id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert rows["prose first"]["content"] == "Both are good.\n8 9"  # stored as it came
    assert rows["prose first"]["failed_tries"] == [{"content": "Both are good.\n8 9"}]
    assert "refusal: I will not." in rows["refusal"]["error"]
    assert rows["time-out"]["error"] == "time-out"
    assert rows["cut connection"]["error"] == "cut connection"
    assert rows["server error"]["error"] == "status 500" and rows["bad request"]["error"] == "status 400: no"
    for name in ("half an answer", "a page", "choices no list", "no choices", "no object", "parts"):
        assert rows[name]["error"].startswith("malformed reply: "), name
    assert rows["retried"]["failed_tries"] == [{"content": "What?"}]
    with pytest.raises(RefusedInput, match="20 of 23 judgements failed"):
        find("llava-bench").score(Files(reviews=[path]))
    found = find("llava-bench").score(Files(reviews=[path], max_failed=0.9))
    # (8, 6), (10, 9), (6, 6): 100 x 21 / 24
    assert (found.scores["all"], found.failed) == (87.5, 20)


def test_a_second_run_judges_only_what_failed(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = {"good": said("8 6"), "late": said("?", "?", "9 9")}
    tasks = [JudgeTask({"question_id": name}, f"[{name}]") for name in endpoint.replies]
    path = tmp_path / "reviews.jsonl"
    first = judging.judge(settings(endpoint), tasks, path, llava_bench.parse, "tuple")
    second = judging.judge(settings(endpoint), tasks, path, llava_bench.parse, "tuple")
    third = judging.judge(settings(endpoint), tasks, path, llava_bench.parse, "tuple")
    assert [(one.kept, one.judged, one.failed) for one in (first, second, third)] == [
        (0, 2, 1),
        (1, 1, 0),
        (2, 0, 0),
    ]
    assert endpoint.asked == {"good": 1, "late": 3}
    rows = {row["question_id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert rows["late"]["failed_tries"] == [{"content": "?"}, {"content": "?"}]


def test_a_refused_key_stops_at_once_and_what_was_judged_stays(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.replies = {"good": said("8 6"), "key": [(401, None, 0.0)]}
    tasks = [JudgeTask({"question_id": name}, f"[{name}]") for name in endpoint.replies]
    path = tmp_path / "reviews.jsonl"
    with pytest.raises(RefusedInput, match=r"the judge j at .* refuses"):
        judging.judge(settings(endpoint, concurrency=1), tasks, path, llava_bench.parse)
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == ["good"]


def test_the_key_is_not_shown_by_an_endpoint_that_repeats_it(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", f"{key}\n")
    told = f"wrong: {key}"
    endpoint.replies = {"page": said(told.encode()), "bad": [(400, told, 0.0)], "key": [(401, told, 0.0)]}
    tasks = [JudgeTask({"question_id": name}, f"[{name}]") for name in endpoint.replies]
    path = tmp_path / "reviews.jsonl"
    with pytest.raises(RefusedInput, match=r"refuses: .*wrong: \*\*\*") as refused:
        judging.judge(settings(endpoint, concurrency=1), tasks, path, llava_bench.parse)
    stored = path.read_text()
    assert stored.count("wrong: ***") == 4  # two tries of two questions
    assert key not in stored + str(refused.value)


@pytest.mark.parametrize("url", ["http://localhost:80O0/v1", "http://[::1"])
def test_an_address_that_is_none_is_refused(endpoint: Endpoint, tmp_path: Path, url: str) -> None:
    with pytest.raises(RefusedInput, match="the judge's URL http"):
        judging.judge(settings(endpoint, url=url), [JudgeTask({"question_id": 1}, "[x]")], tmp_path / "r.jsonl",
                      llava_bench.parse)  # fmt: skip


def test_without_a_key_or_with_one_in_the_url_nothing_is_asked(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [JudgeTask({"question_id": 1}, "[x]")]
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RefusedInput, match="set OPENAI_API_KEY"):
        judging.judge(settings(endpoint), tasks, tmp_path / "r.jsonl", llava_bench.parse)
    with pytest.raises(RefusedInput, match="the judge's URL holds"):
        url = endpoint.url.replace("http://", "http://user:secret@")
        judging.judge(settings(endpoint, url=url), tasks, tmp_path / "r.jsonl", llava_bench.parse)


class Judged(Component):
    """The judge's part of an evaluation: the answers lie beside the questions."""

    name: ClassVar[str] = "evaluate"
    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = ExamSettings
    on_ray: ClassVar[bool] = False

    def run(self, job: Job[ExamSettings]) -> None:
        folder = job.scratch / "exam"
        shutil.copytree(Path(job.settings.questions).parent, folder)
        names = {name: folder / f"{name}.jsonl" for name in ("answers", "questions", "reference", "context")}
        exam = Exam(
            job.settings.title, find(job.settings.benchmark), (), Files(**names), "", 16, (RIGHT,), folder, "", {},
            job.settings,
        )  # fmt: skip
        for path in reviewed(job, exam, exam.files).reviews:
            job.folder.upload(path, path.name)


def judge_in(root: str, mlflow: str, entry: str) -> Artifact:
    """A run of `Judged`, in a process of its own or in this one."""
    workspace = Workspace(open_store(root), Tracking(mlflow, "judged", f"{root}/mlflow"))
    return run_component(Judged(), ExamSettings.model_validate_json(entry), {}, workspace).artifact


def test_kill_9_repeats_only_the_judgements_since_they_were_last_kept(
    endpoint: Endpoint, tmp_path: Path, mlflow_db: str
) -> None:
    bench, root, count = tmp_path / "bench", tmp_path / "root", 60
    bench.mkdir()
    for name in ("questions", "context", "reference", "answers"):
        rows = [
            {"question_id": number, "image": f"{number}", "text": f"[q{number}] {name}", "caption": "x"}
            for number in range(count)
        ]
        (bench / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint.replies = {f"q{number}": [(200, "8 6", 0.1)] for number in range(count)}
    entry = json.dumps({
        "benchmark": "llava-bench", "judge": {"model": "j", "url": endpoint.url, "concurrency": 2},
        **{name: str(bench / f"{name}.jsonl") for name in ("questions", "context", "reference")},
    })  # fmt: skip
    code = (
        "import sys; from components.scoring import judge; judge.KEEP_SECONDS = 0.3; "
        "from tests.components.scoring.test_judge import judge_in; judge_in(*sys.argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root), mlflow_db, entry], cwd=REPOSITORY)

    def kept() -> list[str]:
        found = list(root.glob("evaluate/*/**/checkpoints/reviews/*.jsonl"))
        return [
            f"q{json.loads(line)['question_id']}" for path in found for line in path.read_text().splitlines()
        ]

    try:
        deadline = time.monotonic() + 120
        while len(kept()) < 10 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    there = set(kept())
    time.sleep(0.3)  # what the dead process asked for last arrives
    before = Counter(endpoint.asked)
    assert 10 <= len(there) < count
    artifact = judge_in(str(root), mlflow_db, entry)
    again = {name for name, asked in endpoint.asked.items() if before[name] and asked > before[name]}
    assert again == set(before) - there
    assert max(endpoint.asked.values()) <= 2
    rows = read_rows(artifact.local() / "reviews-1.jsonl")
    assert sorted(row["question_id"] for row in rows) == list(range(count))


def test_two_judge_runs_the_second_swapped_give_mean_and_spread(endpoint: Endpoint, tmp_path: Path) -> None:
    questions = [
        {"question_id": 1, "image": "1.jpg", "text": "[one] What?", "category": "conv"},
        {"question_id": 2, "image": "2.jpg", "text": "[two] Why?", "category": "complex"},
    ]
    notes = [
        {"image": "1.jpg", "captions": ["a dog"], "instances": [{"category": "dog", "bbox": [0, 0, 0.5, 1]}]},
        {"image": "2.jpg", "caption": ["a cat"]},
    ]
    for name, rows in {
        "questions": questions,
        "context": notes,
        "reference": [{"question_id": id_, "text": f"REFERENCE {id_}"} for id_ in (2, 1)],
        "answers": [
            {"question_id": id_, "text": f"CANDIDATE {id_}", "answer_id": f"c{id_}"} for id_ in (1, 2)
        ],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint.replies = {"one": said("8 6", "4 8"), "two": said("10 5", "6 9")}
    files = Files(
        answers=tmp_path / "answers.jsonl",
        questions=tmp_path / "questions.jsonl",
        reference=tmp_path / "reference.jsonl",
        reviews=[tmp_path / "usual.jsonl", tmp_path / "swapped.jsonl"],
        context=tmp_path / "context.jsonl",
        judge_swap=True,
    )
    run_judge(settings(endpoint), "llava-bench", files)
    usual = [text for text in endpoint.texts if text.index("REFERENCE") < text.index("CANDIDATE")]
    assert len(usual) == 2
    assert "a dog\ndog: [0.0, 0.0, 0.5, 1.0]" in "".join(usual)
    found = find("llava-bench").score(files)
    # usual: candidate 6 + 5 of reference 8 + 10; swapped: candidate 4 + 6 of reference 8 + 9
    each = (100 * 11 / 18, 100 * 10 / 17)
    assert [run["all"] for run in found.extra["runs"]] == pytest.approx(each)
    assert found.scores["all"] == pytest.approx(sum(each) / 2)
    assert found.failed == 0 and not found.remarks


def test_scienceqa_asks_a_second_model_and_then_a_judge_where_they_differ(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    row = {"choices": ["x", "y"], "answer": 0, "hint": "", "image": "", "subject": "natural science",
           "grade": "grade2", "lecture": "", "solution": ""}  # fmt: skip
    problems = {name: row | {"question": f"[{name}]"} for name in ("same", "differ", "silent")}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    own = {"same": "A", "differ": "B", "silent": "A"}
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"question_id": id_, "text": text}) + "\n" for id_, text in own.items())
    )
    right = "The answer is A."
    endpoint.replies = {"same": said(right), "differ": said(right), "silent": said("?", "?", right)}
    files = Files(
        answers=tmp_path / "own.jsonl",
        labels={"": tmp_path / "problems.json"},
        reference=tmp_path / "gpt4.jsonl",
        reviews=[tmp_path / "verdicts.jsonl"],
    )
    run_judge(settings(endpoint), "scienceqa", files)
    found = find("scienceqa").score(files)
    assert found.scores["average"] == pytest.approx(200 / 3)
    assert found.extra["ensembles"]["complement"]["average"] == 100.0
    assert found.extra["ensembles"]["judge"]["average"] == 100.0
    assert found.extra["ensembles"]["judge"]["disagreements"] == 2
    assert endpoint.asked == {"same": 1, "differ": 2, "silent": 3}
