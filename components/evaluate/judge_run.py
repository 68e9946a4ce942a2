"""A live judge inside an evaluation: reviews are kept as they come, so that a crash repeats, and pays for, few.

Every `judge.KEEP_SECONDS` they are carried from the scratch folder into the artifact's, where the next run finds them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from components.contract import Job
from components.evaluate.exams import Exam
from components.scoring import judge as judging
from components.scoring.benchmarks import Files

KEPT = "checkpoints/reviews/"


def reviews(job: Job, exam: Exam, files: Files, folder: Path) -> Files:
    """`files` with a reviews file for each run of the judge, in `folder`; what was judged before is kept."""
    one = exam.settings
    assert one.judge is not None
    made = []
    for run in range(one.judge_runs):
        path = folder / f"reviews-{run + 1}.jsonl"
        key = f"{KEPT}{one.title}-{path.name}"
        if found := job.folder.fetch(key):
            path.write_bytes(found[0])
        tasks = judging.marks_tasks(
            files.need("questions", "the question file"),
            folder / _copy(one.context, "context"),
            files.need("reference", "the answers that the judge compares with"),
            files.need("answers", "the model's answers"),
            one.judge_swap and run % 2 == 1,
        )
        keep = partial(_keep, job, path, key)
        try:
            tally = judging.judge(one.judge, tasks, path, judging.parse_marks, "tuple", keep)
        finally:
            keep()
        job.say(
            f"{one.title}: judge run {run + 1} of {one.judge_runs}: {tally.judged:,} judged, {tally.kept:,} were "
            f"there, {tally.failed:,} failed"
        )
        made.append(path)
    return replace(files, reviews=made)


def _keep(job: Job, path: Path, key: str) -> None:
    if path.exists():
        job.lease.check()
        job.folder.upload(path, key)


def _copy(path: str | None, what: str) -> str:
    return f"{what}{Path(path or '').suffix}"
