"""Scores for answers that others produced: files in, numbers out, one JSON object or a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contract import say, tell
from components.scoring import bootstrap
from components.scoring.benchmarks import Files, Scored, find
from components.scoring.judge import JudgeSettings, JudgeTask, Parse, Tally
from components.scoring.judge import judge as have_judged
from llava.errors import RefusedInput


def score(benchmark: str, files: Files) -> Scored:
    """The outcome; what a reader must know goes to standard error."""
    scored = find(benchmark).score(files)
    for remark in scored.remarks:
        say(f"note: {remark}")
    return scored


def run_judge(settings: JudgeSettings, benchmark: str, files: Files) -> None:
    """Let a live judge fill the files that `score` reads, where they do not hold its replies yet."""
    judged = find(benchmark).judge
    if judged is None:
        raise RefusedInput(f"--judge: {benchmark} needs no judge, or only scores stored grades")

    def ask(tasks: Sequence[JudgeTask], path: Path, parse: Parse, field: str | None = None) -> None:
        _said(path, have_judged(settings, tasks, path, parse, field))

    judged(files, ask)


def flag(field: str) -> str:
    """How the command calls a field of `Files`."""
    return f"--{field.replace('_', '-')}"


def side(name: str) -> Callable[[str], str]:
    """How `llava compare BENCHMARK BASE NEW` calls a field; `name`: base or new."""
    own = {"answers": name.upper(), "reviews": f"--{name}-reviews"}
    return lambda field: own.get(field, flag(field))


@dataclass(frozen=True)
class Option:
    """One option of a command, as it was typed."""

    name: str
    field: str
    """Which field of `Files` it is; `JUDGE` for what belongs to a live judge alone."""
    value: Any

    @property
    def given(self) -> bool:
        """Whether it was typed at all: None, False and an empty list are the defaults."""
        return self.value is not None and self.value is not False and self.value != []


JUDGE = "judge"


def refuse_foreign(benchmark: str, options: Sequence[Option]) -> None:
    """Raise RefusedInput for options that would change nothing, all of them at once.

    Those are options that the benchmark does not take, and without a judge those that only its judge needs.
    """
    known = find(benchmark)
    judged = {JUDGE, *known.judge_reads} if known.judge else set[str]()
    takes = judged | set(known.reads)
    judging = any(option.given for option in options if option.name == flag(JUDGE))
    foreign = [option.name for option in options if option.given and option.field not in takes]
    idle = [
        option.name
        for option in options
        if option.given and not judging and option.field in judged and option.field not in known.reads
    ]
    faults = []
    if foreign:
        taken = ", ".join(option.name for option in options if option.field in takes)
        faults.append(f"{benchmark} takes no {', '.join(foreign)}; it takes {taken}")
    if idle:
        faults.append(f"{', '.join(idle)}: only a live judge needs that, so name one with {flag(JUDGE)}")
    if faults:
        raise RefusedInput("; ".join(faults))


def refuse_any(options: Sequence[Option], why: str) -> None:
    """Raise RefusedInput for every one of the options that was given."""
    if foreign := [option.name for option in options if option.given]:
        raise RefusedInput(f"{', '.join(foreign)}: {why}")


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
    tell(f"{scored.benchmark}: {scored.n:,} questions, {scored.failed:,} failed")
    for name, value in scored.scores.items():
        low, high = intervals[name]
        tell(
            f"{name:24} "
            + ("undefined" if math.isnan(value) else f"{value:10.4f}   95 % [{low:.2f}, {high:.2f}]")
        )
    for name, columns in scored.extra.get("ensembles", {}).items():
        tell(f"{name:24} {columns['average']:10.4f}   ensemble, {columns['failed']:,} failed")


def print_json(value: Any) -> None:
    """One object on one line of standard output."""
    print(json.dumps(_without_nan(value), allow_nan=False), flush=True)


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


def _said(path: Path, tally: Tally) -> None:
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
