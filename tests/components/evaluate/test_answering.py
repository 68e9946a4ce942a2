"""Asking: batches, what a kill costs, and workers that die."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.contract import Artifact, open_store
from components.evaluate import Evaluate, EvaluateSettings, ExamSettings, exams
from components.evaluate.answering import RIGHT, Answerer, Ask, answer_all, batches
from components.scoring.pictures import Picture
from tests.support.evaluated import QUESTIONS, Given, GivenSettings, Row


def asks(rows: list[Row]) -> list[Ask]:
    return [
        Ask(f"vqa/{number:07d}", row["conversations"][0]["value"][8:], 6, Picture.of(row["image"]["bytes"]),
            blank=True, expected="red")
        for number, row in enumerate(rows)
    ]  # fmt: skip


def test_batched_and_single_answers_are_the_same(
    run_in: Callable[..., Any], model_folder: Path, entries: list[dict[str, Any]], tmp_path: Path
) -> None:
    worker = Answerer(run_in(Given("finetune", model_folder), GivenSettings()).artifact, gpu=False)
    waiting = []
    for number, entry in enumerate(entries):
        settings = ExamSettings(**entry | {"max_new_tokens": 8})
        exam = exams.open_exam(settings, tmp_path / str(number))
        waiting += [
            Ask(f"{settings.title}/{place}", item.prompt, 8, item.picture)
            for place, item in enumerate(exam.items)
        ]
    together = {one["key"]: one["answers"] for batch in batches(waiting, 32) for one in worker.answer(batch)}
    alone = {ask.key: worker.answer([ask])[0]["answers"] for ask in waiting}
    assert len(alone) > 40
    assert together == alone
    assert len({answers[RIGHT] for answers in alone.values()}) > 10


@pytest.mark.drill
def test_a_killed_evaluation_goes_on_with_the_unfinished_batches_alone(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], known_rows: list[Row], tmp_path: Path
) -> None:
    written: list[str] = []

    def run(name: str, stop_after: int | None = None) -> dict[str, Any]:
        folder = open_store(tmp_path / name)
        before = {entry.key for entry in folder.list()}

        def before_write() -> None:
            if stop_after is not None and len(list(folder.list())) == stop_after:
                raise KeyboardInterrupt

        found = answer_all(
            inputs["model"], asks(known_rows), folder, batch_size=8, workers=1, before_write=before_write,
            say=written.append,
        )  # fmt: skip
        assert len(list(folder.list())) == 5
        assert before <= {entry.key for entry in folder.list()}
        lines = [json.loads(line) for entry in folder.list() for line in folder.read(entry.key).splitlines()]
        assert sorted(line["key"] for line in lines) == [ask.key for ask in asks(known_rows)]
        return found

    with pytest.raises(KeyboardInterrupt):
        run("killed", stop_after=2)
    kept = {
        entry.key: open_store(tmp_path / "killed").stat(entry.key)
        for entry in open_store(tmp_path / "killed").list()
    }
    resumed = run("killed")
    assert "16 of 40 questions are answered already" in written
    assert {key: open_store(tmp_path / "killed").stat(key) for key in kept} == kept
    assert resumed == run("undisturbed")


def test_a_killed_worker_is_replaced_and_every_question_is_answered(
    run_in: Callable[..., Any], inputs: dict[str, Artifact], lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    say, killed = type(lines).say, []

    def kill_worker(text: str, prefix: str = "") -> None:
        say(lines, text, prefix)
        if not killed and "questions answered" in text:
            own = psutil.Process().children(recursive=True)
            killed.extend(child for child in own if "".join(child.cmdline()).startswith("ray::Answerer"))
            for worker in killed:
                worker.kill()

    monkeypatch.setattr(lines, "say", kill_worker)
    settings = EvaluateSettings(max_new_tokens=4, workers=1, batch_size=16)
    artifact = run_in(Evaluate(), settings, inputs).artifact
    assert len(killed) == 1
    assert artifact.manifest.metrics["eval/n"] == QUESTIONS
