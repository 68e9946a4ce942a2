"""The four steps of an evaluation: gather the exams, ask, score, report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from components.contract import Job
from components.evaluate import contamination, exams, report
from components.evaluate.answering import BLANK, RIGHT, WRONG, Answer, Ask, answer_all
from components.evaluate.exams import Exam
from components.evaluate.heldout import HeldOutExam, open_heldout
from components.evaluate.results import Result, result_of
from components.evaluate.settings import EvaluateSettings
from components.scoring.base import Scored
from components.scoring.outcomes import CONTAMINATION
from components.scoring.questions import heldout_rows
from components.scoring.table import scores_table
from llava.errors import RefusedInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = "example.png"
"""A picture of the evaluation, for whoever wants to ask the model about one."""
MODELS = {RIGHT: "model", BLANK: "with blank pictures", WRONG: "with wrong pictures"}
"""What a condition's column is called."""


def gather(job: Job[EvaluateSettings]) -> list[Exam]:
    """The held-out questions, where the dataset has some, and every benchmark of the settings."""
    settings, dataset, found = job.settings, job.inputs["questions"], list[Exam]()
    if heldout_rows(dataset.folder):
        heldout = open_heldout(dataset.folder, settings, job.scratch / "heldout")
        found.append(heldout)
        for reason, count in sorted(heldout.skipped.items()):
            job.say(f"{count:,} held-out rows are no question: {reason}")
        job.notes.update(questions=heldout.digest, rows=len(heldout.questions), skipped=dict(heldout.skipped))
        job.run.dataset("questions asked", heldout.digest, dataset.uri)
    for number, one in enumerate(settings.benchmarks):
        exam = exams.open_exam(one, job.scratch / "exams" / one.title, exams.called(number))
        found.append(exam)
        job.run.dataset(f"benchmark {exam.title}", exam.digest, next(iter(one.paths.values())))
    return found


def left_out(job: Job[EvaluateSettings], found: Sequence[Exam]) -> tuple[dict[str, set[str]], list[str]]:
    """Look for pictures that the model was trained on: the units to leave out, by exam, and what to say about it."""
    how, model = job.settings.contamination, job.inputs["model"]
    if how == "off":
        return {}, []
    shown: dict[str, dict[str, set[str]]] = {}
    for exam in found:
        for item in exam.items:
            if item.picture is not None:
                shown.setdefault(item.picture.sha256, {}).setdefault(exam.title, set()).add(item.unit)
    seen = contamination.look(model, [job.workspace.store], set(shown))
    if seen.unknown and how == "exclude":
        raise RefusedInput(
            f"evaluate.contamination=exclude: {len(seen.unknown)} of the artifacts that {model.uri} comes "
            f"from are gone (first: {seen.unknown[0][:16]}): choose report, or train it again"
        )
    by_exam: dict[str, set[str]] = {}
    for sha in seen.pictures:
        for title, units in shown[sha].items():
            by_exam.setdefault(title, set()).update(units)
    by_exam = {exam.title: by_exam[exam.title] for exam in found if exam.title in by_exam}
    told = {
        "looked_through": seen.datasets,
        "not_found": seen.unknown,
        "pictures": sorted(seen.pictures),
        "questions": {title: sorted(units) for title, units in by_exam.items()},
    }
    job.folder.write(CONTAMINATION, json.dumps(told, ensure_ascii=False, indent=1).encode())
    job.metrics["eval/contamination/pictures/found"] = float(len(seen.pictures))
    remarks = contamination.remarks(seen, len(shown), by_exam, how == "exclude")
    for remark in remarks:
        job.say(remark)
    return (by_exam if how == "exclude" else {}), remarks


def ask(job: Job[EvaluateSettings], found: Sequence[Exam]) -> dict[str, Answer]:
    """Every question under each of its exam's conditions; the answers by `key`."""
    asks = [
        Ask(
            key(exam, number),
            item.prompt,
            exam.answer_length,
            item.picture,
            blank=BLANK in exam.conditions,
            wrong=item.wrong if WRONG in exam.conditions else None,
            expected=item.expected,
        )
        for exam in found
        for number, item in enumerate(exam.items)
    ]
    return answer_all(
        job.inputs["model"],
        asks,
        job.folder,
        batch_size=job.settings.batch_size,
        workers=job.settings.workers,
        gpu=job.settings.gpu,
        before_write=job.lease.check,
        say=job.say,
    )


def score(
    job: Job[EvaluateSettings],
    found: Sequence[Exam],
    answers: Mapping[str, Answer],
    leave_out: Mapping[str, set[str]],
) -> list[Result]:
    """The scores of each exam from its files, as `llava score` gives them; told to manifest and MLflow."""
    results = []
    for exam in found:
        given = [answers[key(exam, number)] for number in range(len(exam.items))]
        result = result_of(job, exam, given, leave_out.get(exam.title, ()))
        results.append(result)
        job.metrics.update(result.metrics)
        for remark in result.remarks:
            job.say(remark)
    job.notes["exams"] = {result.exam.title: result.note for result in results}
    return results


def publish(job: Job[EvaluateSettings], results: Sequence[Result], remarks: Sequence[str]) -> None:
    """Tables, charts and samples, in the artifact and in MLflow."""
    models = by_model(results)
    samples = report.pick([sample for result in results for sample in result.samples])
    heldout = next((result.heldout for result in results if isinstance(result.exam, HeldOutExam)), [])
    said = [*remarks, *(remark for result in results for remark in result.remarks)]
    facts = {"model": job.inputs["model"].uri, "questions": job.inputs["questions"].uri} | {
        f"asked of {result.exam.title}": f"{result.note['n']:,} (exam {result.exam.digest[:16]})"
        for result in results
    }
    _keep(job, "report.md", report.page(facts, models, heldout, said, samples))
    _keep(job, "benchmarks.png", report.score_chart(models))
    items = {result.exam.title: result.exam.items for result in results}
    pictures = [items[title][number].picture for title, number in (sample.index for sample in samples)]
    opened = [None if picture is None else picture.open() for picture in pictures]
    _keep(job, "samples.png", report.samples_figure(samples, opened))
    if heldout:
        _keep(job, "by_kind.png", report.bar_chart(heldout))
        job.run.table(report.table(heldout), "eval/by_kind.json")
        job.run.table(report.answers_table(heldout), "eval/answers.json")
    job.run.table(scores_table(models), "eval/benchmarks.json")
    seen = [index for index, picture in enumerate(opened) if picture is not None]
    shown = next((index for index in seen if samples[index].answers[RIGHT][1]), seen[0] if seen else None)
    if shown is not None and (picture := opened[shown]) is not None:
        picture.save(job.scratch / EXAMPLE)
        job.folder.upload(job.scratch / EXAMPLE, EXAMPLE)
        job.notes["example"] = {
            "picture": EXAMPLE,
            "question": samples[shown].question,
            "expected": samples[shown].expected,
        }
    for result in results:
        if result.outcomes:
            job.say(_headline(result))


def by_model(results: Sequence[Result]) -> dict[str, dict[str, Scored]]:
    """Outcomes by exam, by what the condition's column is called; a condition that no exam has is left out."""
    found: dict[str, dict[str, Scored]] = {MODELS[RIGHT]: {}}
    for result in results:
        for condition, scored in result.outcomes.items():
            found.setdefault(MODELS[condition], {})[result.exam.title] = scored
    return found


def key(exam: Exam, number: int) -> str:
    """What names a question among all that are asked."""
    return f"{exam.title}/{number:07d}"


def _headline(result: Result) -> str:
    headline, scored = result.exam.benchmark.headline, result.outcomes[RIGHT]
    others = [
        f"{each.scores[headline]:.4g} {MODELS[condition]}"
        for condition, each in result.outcomes.items()
        if condition != RIGHT
    ]
    told = "".join(f"; {one}" for one in others)
    return f"{result.exam.title}: {headline} {scored.scores[headline]:.4g} of {scored.n:,} questions{told}"


def _keep(job: Job[EvaluateSettings], name: str, content: str | Figure) -> None:
    """Into the artifact and into MLflow."""
    if isinstance(content, str):
        job.folder.write(name, content.encode())
        job.run.text(content, f"eval/{name}")
        return
    path = job.scratch / name
    with warnings.catch_warnings():
        # Answers may hold letters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph")
        content.savefig(path, dpi=110)
    job.folder.upload(path, name)
    job.run.artifact(path, "eval")
