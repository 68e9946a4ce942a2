"""A live judge inside an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.contract import Artifact
from components.evaluate import Evaluate, EvaluateSettings
from components.scoring.outcomes import comparable, outcomes
from components.scoring.paired import OtherQuestions
from llava.data.jsonl import to_jsonl
from llava.errors import RefusedInput
from tests.support.evaluated import picture
from tests.support.judge_endpoint import Endpoint, said


def test_a_judge_is_asked_again_for_what_failed_and_for_nothing_else(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], tmp_path: Path, lines: Any, endpoint: Endpoint
) -> None:
    pytest.importorskip("openai")
    folder = tmp_path / "bench"
    folder.mkdir()
    rows = [
        {"question_id": number, "image": f"{number}.png", "text": f"[q{number}] What?", "category": "conv"}
        for number in range(4)
    ]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture("red"))
    notes = [{"image": f"{number}.png", "caption": "a red picture"} for number in range(4)]
    reference = [row | {"text": "Red.", "answer_id": f"r{row['question_id']}"} for row in rows]
    for name, lines_ in (("questions", rows), ("context", notes), ("reference", reference)):
        (folder / f"{name}.jsonl").write_bytes(to_jsonl(lines_))
    entry = {
        "benchmark": "llava-bench", "questions": str(folder / "questions.jsonl"), "images": str(folder),
        "max_new_tokens": 4,
    }  # fmt: skip
    judge = {"model": "j", "url": endpoint.url, "tries": 1, "pause": 0.01}
    judged = entry | {
        "reference": str(folder / "reference.jsonl"), "context": str(folder / "context.jsonl"),
        "judge": judge, "judge_runs": 2, "judge_swap": True, "max_failed": 0.2,
    }  # fmt: skip
    endpoint.replies = {f"q{number}": said("8 4") for number in range(3)} | {
        "q3": said("none", "none", "8 4")
    }
    settings = EvaluateSettings(max_new_tokens=2, limit=6, benchmarks=[judged])
    with pytest.raises(
        RefusedInput,
        match=r"^exams/llava-bench/reviews-1\.jsonl, .*2 of 8 judgements failed .* is 20 %: there is no score",
    ):
        run_in(Evaluate(), settings, inputs)
    assert dict(endpoint.asked) == {"q0": 2, "q1": 2, "q2": 2, "q3": 2}
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert dict(endpoint.asked) == {"q0": 2, "q1": 2, "q2": 2, "q3": 4}
    note = artifact.manifest.notes["exams"]["llava-bench"]
    # First run 100 x 4 / 8, in the swapped one the candidate stands first: 100 x 8 / 4.
    assert note["scores"]["conversation"] == pytest.approx((50 + 200) / 2)
    assert outcomes(artifact)["llava-bench"].scores["all"] == note["scores"]["all"]
    other = judged | {"judge": judge | {"model": "k"}}
    again = run_in(
        Evaluate(), EvaluateSettings(max_new_tokens=2, limit=6, benchmarks=[other]), inputs
    ).artifact
    assert comparable(artifact, again, ["vqa"])
    with pytest.raises(
        OtherQuestions, match="llava-bench: the two answered other questions, or were judged otherwise"
    ):
        comparable(artifact, again, ["llava-bench"])
    unjudged = run_in(
        Evaluate(), EvaluateSettings(max_new_tokens=2, limit=6, benchmarks=[entry]), inputs
    ).artifact
    assert unjudged.manifest.notes["exams"]["llava-bench"]["scores"] == {}
    assert any("answered and not scored" in line for line in lines.said)
    answers = (unjudged.local() / "exams" / "llava-bench" / "answers.jsonl").read_text().splitlines()
    first = json.loads(answers[0])
    assert list(first) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
