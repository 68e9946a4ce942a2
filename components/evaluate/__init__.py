"""Evaluation: does the model answer held-out questions, and does it need the picture for it?

Each question is asked three times: with its own picture, with a blank one (the image processor's mean colour,
same size) and with another question's picture. A model that reads only the text scores alike on all three.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from components.contract import Artifact, Component, Job, Settings, run_field
from components.evaluate import report
from components.evaluate.answering import Asked, answer_all, to_jsonl
from components.evaluate.questions import exam_digest, heldout_rows, read_questions, wrong_pictures
from components.evaluate.scores import Answered, metrics
from llava.data.images import decode
from llava.errors import RefusedInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXAMPLE = "example.png"
"""A held-out picture, for whoever wants to ask the model about one."""


class EvaluateSettings(Settings):
    """What is asked, and how it is spread over workers."""

    benchmark: Literal["vqa"] = Field(
        "vqa", description="How answers are judged, and the metrics' name: vqa = short answers, exact match"
    )
    limit: int | None = Field(
        None, ge=2, description="Ask only so many held-out questions, drawn by seed; null: all"
    )
    max_new_tokens: int = Field(16, ge=1, description="Tokens after which an answer is cut")
    seed: int = Field(0, description="Draws the questions under a limit and the wrong pictures")
    batch_size: int = run_field(32, ge=1, description="Questions that are answered at once by one worker")
    workers: int = run_field(
        1, ge=1, description="Ray actors, each holding the model (and a GPU where there are any)"
    )


class Evaluate(Component):
    """Inputs: `model` (a stock LLaVA folder in `model/`) and `questions` (a dataset with `heldout/*.parquet`).

    Makes `answers.jsonl`, `report.md`, `samples.png`, `by_kind.png` and `example.png`; `notes["questions"]` is
    equal for two evaluations exactly when their scores may be compared.
    """

    name: ClassVar[str] = "evaluate"
    version: ClassVar[str] = "2"
    Settings: ClassVar[type[Settings]] = EvaluateSettings

    def check(self, settings: EvaluateSettings, inputs: Mapping[str, Artifact]) -> None:
        """Refuse a model artifact without a model and a dataset without held-out rows."""
        model, questions = inputs["model"], inputs["questions"]
        if not any(file.path == "model/config.json" for file in model.manifest.files):
            raise RefusedInput(
                f"{model.uri}: holds no model/config.json; give a finetune, pretrain or backbones artifact"
            )
        if not heldout_rows(questions.folder):
            raise RefusedInput(
                f"{questions.uri}: no held-out rows, so there is nothing to ask; give an instruct artifact that kept "
                "some rows back"
            )

    def run(self, job: Job) -> None:
        """Ask, score, report; answers are kept chunk by chunk, so that a second run goes on."""
        settings: EvaluateSettings = job.settings
        model, dataset = job.inputs["model"], job.inputs["questions"]
        questions, skipped = read_questions(dataset.folder, settings.limit, settings.seed)
        wrong = wrong_pictures(questions, settings.seed)
        terms = {
            "benchmark": settings.benchmark,
            "max_new_tokens": settings.max_new_tokens,
            "version": self.version,
        }
        exam = exam_digest(questions, wrong, terms)
        for reason, count in sorted(skipped.items()):
            job.say(f"{count:,} held-out rows are no question: {reason}")
        rows = answer_all(
            model,
            [Asked(question, questions[other]) for question, other in zip(questions, wrong, strict=True)],
            job.folder,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            workers=settings.workers,
            before_write=job.lease.check,
            say=job.say,
        )
        job.metrics.update(metrics(rows, settings.benchmark))
        job.notes.update(questions=exam, benchmark=settings.benchmark, rows=len(rows), skipped=skipped)
        if "eval/loss" not in job.metrics:
            job.say("the model's chat template is none of ours: held-out loss is not measured")
        job.run.dataset("questions asked", exam, dataset.uri)
        samples = report.pick_samples(rows)
        facts = {
            "model": model.uri,
            "questions": f"{len(rows):,} of {dataset.uri} (exam {exam[:16]})",
            "judged by": "exact match, ignoring case, blanks around and one final full stop",
        }
        job.folder.write("answers.jsonl", to_jsonl(rows))
        _publish(job, "report.md", report.page(rows, samples, facts))
        _publish(job, "by_kind.png", report.bar_chart(rows))
        pictures = [decode(questions[index].image) for index in samples]
        _publish(job, "samples.png", report.samples_figure([rows[index] for index in samples], pictures))
        example = next((index for index in samples if rows[index]["correct"]["right_image"]), samples[0])
        pictures[samples.index(example)].save(job.scratch / EXAMPLE)
        job.folder.upload(job.scratch / EXAMPLE, EXAMPLE)
        job.notes["example"] = {"picture": EXAMPLE, "question": rows[example]["question"]}
        job.run.table(report.table(rows), "eval/by_kind.json")
        job.run.table(report.answers_table(rows), "eval/answers.json")
        score = job.metrics[f"eval/{settings.benchmark}/exact_match"]
        blank = job.metrics[f"eval/{settings.benchmark}/blank_image"]
        job.say(f"exact match {score:.1f} % of {len(rows):,} questions; {blank:.1f} % with a blank picture")


def _publish(job: Job, name: str, content: str | Figure) -> None:
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


__all__ = ["Answered", "Evaluate", "EvaluateSettings"]
