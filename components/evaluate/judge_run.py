"""A live judge inside an evaluation: reviews are kept as they come, so that a crash repeats, and pays for, few.

Every `judge.KEEP_SECONDS` they are carried from the scratch folder into the artifact's, where the next run finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from components.contract import Job
from components.evaluate import exams
from components.evaluate.exams import Exam
from components.evaluate.settings import EvaluateSettings
from components.scoring.base import Files
from components.scoring.judge import JudgeTask, Parse
from components.scoring.judge import judge as have_judged

KEPT = "checkpoints/reviews/"


def reviewed(job: Job[EvaluateSettings], exam: Exam, files: Files) -> Files:
    """`files` with a reviews file for each run of the judge; what was judged before is kept."""
    one = exam.settings
    assert one is not None and one.judge is not None and exam.benchmark.judge is not None
    settings = one.judge
    runs = [exam.local / f"reviews-{run + 1}.jsonl" for run in range(one.judge_runs)]
    for path in runs:
        if found := job.folder.fetch(_key(exam, path)):
            path.write_bytes(found[0])

    def ask(tasks: Sequence[JudgeTask], path: Path, parse: Parse, field: str | None = None) -> None:
        keep = partial(_keep, job, path, _key(exam, path))
        try:
            tally = have_judged(settings, tasks, path, parse, field, keep)
        finally:
            keep()
        job.say(
            f"{exam.title}: judge run {runs.index(path) + 1} of {len(runs)}: {tally.judged:,} judged, "
            f"{tally.kept:,} were there, {tally.failed:,} failed"
        )

    told = replace(files, reviews=runs, judge_swap=one.judge_swap)
    with exams.naming(exam, told):
        exam.benchmark.judge(told, ask)
    return told


def _key(exam: Exam, path: Path) -> str:
    return f"{KEPT}{exam.title}-{path.name}"


def _keep(job: Job[EvaluateSettings], path: Path, key: str) -> None:
    if path.exists():
        job.lease.check()
        job.folder.upload(path, key)
