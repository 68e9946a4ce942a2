"""The settings: an entry that cannot work is refused, and those of the documentation work."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from components.evaluate import EvaluateSettings
from components.register import RegisterSettings
from llava.errors import LlavaError
from tests.support.repository import REPOSITORY


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"benchmark": "pope", "questions": "q"}, "pope: give questions and labels"),
        ({"benchmark": "pope", "questions": "q", "labels": "l"}, "give labels by split"),
        ({"benchmark": "vqa", "name": "mine"}, r"mine \(vqa\): give data, or questions and labels"),
        ({"benchmark": "vqa", "data": "d"}, "benchmarks: 'vqa' is taken"),
        ({"benchmark": "mme"}, "mme: give questions and labels"),
        (
            {"benchmark": "vqa", "name": "x", "data": "d", "labels": "l"},
            r"x \(vqa\): give data, or questions and",
        ),
        ({"benchmark": "vqa", "name": "x", "data": "d", "style": "QCM-LEA"}, r"x \(vqa\): it takes no style"),
        (
            {"benchmark": "captions", "data": "d", "splits": "s", "judge_runs": 4},
            "takes no splits, judge_runs",
        ),
        ({"benchmark": "mme", "questions": "q", "labels": "l", "judge": {"model": "m"}}, "takes no judge"),
        ({"benchmark": "vqa2", "data": "d"}, "no such benchmark; known: vqa, pope, "),
        ({"benchmark": "captions", "data": "s3://key:secret@host/x"}, "credentials|password"),
        (
            {"benchmark": "llava-bench", "questions": "q", "judge": {"model": "m"}},
            "a judge needs reference and context",
        ),
        (
            {
                "benchmark": "llava-bench",
                "questions": "q",
                "reference": "r",
                "context": "c",
                "judge": {"model": "m", "url": "http://me:secret@host/v1"},
            },
            "the judge's URL holds a URI with a password",
        ),
    ],
)
def test_an_entry_that_cannot_work_is_refused_by_name(entry: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LlavaError), match=message):
        EvaluateSettings(benchmarks=[entry])


def test_the_configs_of_the_documentation_are_valid() -> None:
    text = (REPOSITORY / "docs" / "evaluation.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    evaluate, register = (
        next(block[key] for block in blocks if key in block) for key in ("evaluate", "register")
    )
    assert [one.title for one in EvaluateSettings(**evaluate).benchmarks] == [
        "pope", "scienceqa", "receipts", "captions", "llava-bench", "mme", "mmbench", "mm-vet"
    ]  # fmt: skip
    assert RegisterSettings(**register).floors == {"scienceqa/IMG": 60}
