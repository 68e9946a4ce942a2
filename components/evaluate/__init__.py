"""Evaluation: how good are the model's answers, and does it need the picture for them?

Held-out questions are asked three times: with their own picture, with a blank one (the image processor's mean colour,
same size) and with another question's picture. A model that reads only the text scores alike on all three. Further
benchmarks come from a table, with files of one's own or of the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from components.contract import Artifact, Component, Job, Settings, Workspace, refusals
from components.evaluate import evaluation, exams
from components.evaluate.settings import EvaluateSettings, ExamSettings
from components.ray_cluster.connection import require_unless_made
from components.scoring.questions import heldout_rows, two_pictures
from llava.errors import RefusedInput


class Evaluate(Component):
    """Inputs: `model` (a stock LLaVA folder in `model/`) and `questions` (a dataset with `heldout/*.parquet`).

    Makes `answers.jsonl` (held-out questions), `exams/NAME/` (each benchmark's files and answers), `report.md` and its
    pictures; `notes["exams"]` says what was scored, and by which digest two of them may be compared.
    """

    name: ClassVar[str] = "evaluate"
    version: ClassVar[str] = "4"
    Settings: ClassVar[type[Settings]] = EvaluateSettings
    takes = MappingProxyType({"model": "model", "questions": "conversations"})
    gives = ("evaluation",)

    def preflight(self, settings: EvaluateSettings, workspace: Workspace) -> list[str]:
        """Benchmarks whose files are not there, and a GPU that this machine does not have."""
        missing = [
            mistake
            for number, exam in enumerate(settings.benchmarks)
            for mistake in exams.preflight(exam, exams.called(number))
        ]
        return missing + refusals(lambda: require_unless_made(workspace, self.name, 1, 1, settings.gpu))

    def check_input(self, settings: EvaluateSettings, name: str, artifact: Artifact) -> None:
        """Refuse questions where there are none."""
        if name == "questions":
            _check_questions(settings, artifact)

    def check(self, settings: EvaluateSettings, inputs: Mapping[str, Artifact]) -> None:
        """Refuse a model artifact without a model, and questions where there are none."""
        model, questions = inputs["model"], inputs["questions"]
        if not any(file.path == "model/config.json" for file in model.manifest.files):
            raise RefusedInput(
                f"{model.uri}: holds no model/config.json; give the artifact of a stage that makes or trains a model"
            )
        _check_questions(settings, questions)

    def external(self, settings: EvaluateSettings) -> dict[str, str]:
        """Fingerprints of the benchmarks' files."""
        return {
            key: value
            for number, exam in enumerate(settings.benchmarks)
            for key, value in exams.external(exam, exams.called(number)).items()
        }

    def run(self, job: Job[EvaluateSettings]) -> None:
        """Gather, ask, score, report; answers are kept batch by batch, so that a second run goes on."""
        found = evaluation.gather(job)
        leave_out, remarks = evaluation.left_out(job, found)
        answers = evaluation.ask(job, found)
        results = evaluation.score(job, found, answers, leave_out)
        evaluation.publish(job, results, remarks)


def _check_questions(settings: EvaluateSettings, questions: Artifact) -> None:
    """Refuse a dataset that keeps no questions back, or only questions about one picture."""
    if heldout_rows(questions.folder):
        two_pictures(questions.folder)
    elif not settings.benchmarks:
        raise RefusedInput(
            f"{questions.uri}: no held-out rows, so there is nothing to ask; raise shard.heldout, give an instruct "
            "artifact that kept some rows back, or name evaluate.benchmarks"
        )


__all__ = ["Evaluate", "EvaluateSettings", "ExamSettings"]
