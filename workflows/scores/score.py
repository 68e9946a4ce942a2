"""Scores for answers that others produced: files in, numbers out, one JSON object or a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.contract import say
from components.scoring import bootstrap
from components.scoring import judge as judging
from components.scoring.benchmarks import Files, Scored, find, scienceqa
from components.scoring.benchmarks.letters import letter
from components.scoring.judge import JudgeSettings
from llava.errors import RefusedInput


def score(benchmark: str, files: Files) -> Scored:
    """The outcome; what a reader must know goes to standard error."""
    scored = find(benchmark).score(files)
    for remark in scored.remarks:
        say(f"note: {remark}")
    return scored


def run_judge(
    settings: JudgeSettings, benchmark: str, files: Files, context: Path | None, swap: bool
) -> None:
    """Let a live judge fill the files that `score` reads: `--reviews`, and for scienceqa `--reference`.

    For llava-bench each reviews file is one run; with `swap` every second one shows the candidate first.
    """
    answers = files.need("answers", "the candidate's answers JSONL")
    reference = files.need("reference", "the other model's answers, which the judge sees too")
    if benchmark == "llava-bench":
        questions = files.need("questions", "the question file (question_id, image, text, category)")
        if context is None or not files.reviews:
            raise RefusedInput(
                "a judge needs --context (notes on the pictures) and --reviews, a file for each run"
            )
        for index, path in enumerate(files.reviews):
            tasks = judging.marks_tasks(questions, context, reference, answers, swap and index % 2 == 1)
            _said(path, judging.judge(settings, tasks, path, judging.parse_marks, "tuple"))
        return
    if benchmark != "scienceqa":
        raise RefusedInput(f"--judge: {benchmark} needs no judge, or only scores stored grades")
    problems = files.truth("problems.json")
    ids = [problem.id for problem in scienceqa.read_problems(problems, files.splits, files.split)]
    own = scienceqa.read_texts(answers, ids)
    if reference.suffix != ".json":
        _said(
            reference,
            judging.judge(settings, judging.answer_tasks(problems, ids), reference, judging.parse_letter),
        )
    other = scienceqa.read_texts(reference, ids)
    for path in files.reviews:
        tasks = judging.verdict_tasks(
            problems, scienceqa.differ(letters_of(own), letters_of(other)), own, other
        )
        _said(path, judging.judge(settings, tasks, path, judging.parse_letter))


def label_files(given: Sequence[str]) -> dict[str, Path]:
    """`--labels` as typed, FILE or SPLIT=FILE, by split; the key of a bare file is empty."""
    named: dict[str, Path] = {}
    for value in given:
        split, equals, path = value.partition("=")
        split, path = (split, path) if equals and not Path(value).exists() else ("", value)
        if split in named:
            raise RefusedInput(
                f"--labels {value}: split {split!r} is named twice" if split else "--labels is doubled"
            )
        named[split] = Path(path)
    return named


def as_json(scored: Scored, seed: int = bootstrap.SEED) -> dict[str, Any]:
    """The object that `--json` prints: the agreed keys first; an undefined score is null."""
    intervals = bootstrap.intervals(scored.sums, scored.formula, seed=seed)
    listed = {name: list(pair) for name, pair in intervals.items()}
    agreed = {
        "benchmark": scored.benchmark,
        "n": scored.n,
        "failed": scored.failed,
        "scores": nested(scored.scores),
    }
    more = {"intervals": nested(listed), "confidence": bootstrap.CONFIDENCE, **scored.extra}
    found: dict[str, Any] = _without_nan({**agreed, **more, "remarks": list(scored.remarks)})
    return found


def show(scored: Scored) -> None:
    """A line per score with its interval, on standard output."""
    intervals = bootstrap.intervals(scored.sums, scored.formula)
    print(f"{scored.benchmark}: {scored.n:,} questions, {scored.failed:,} failed")
    for name, value in scored.scores.items():
        low, high = intervals[name]
        print(
            f"{name:24} "
            + ("undefined" if math.isnan(value) else f"{value:10.4f}   95 % [{low:.2f}, {high:.2f}]")
        )
    for name, columns in scored.extra.get("ensembles", {}).items():
        print(f"{name:24} {columns['average']:10.4f}   ensemble, {columns['failed']:,} failed")


def print_json(value: Any) -> None:
    """One object on one line of standard output."""
    print(json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False), flush=True)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        index = tree
        for folder in folders:
            index = index.setdefault(folder, {})
        index[leaf] = value
    return tree


def letters_of(texts: Mapping[str, str]) -> dict[str, str | None]:
    """The letter of each answer."""
    return {id_: letter(text) for id_, text in texts.items()}


def _said(path: Path, tally: judging.Tally) -> None:
    say(
        f"{path}: {tally.judged:,} judged, {tally.kept:,} were there; {tally.retried:,} replies asked for again, "
        f"{tally.failed:,} failed"
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return value
