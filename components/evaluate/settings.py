"""The settings of `evaluate`: the held-out questions, and further benchmarks with their data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from components.contract.component import Settings, run_field
from components.contract.secrets import refuse_secrets
from components.scoring.benchmarks import BENCHMARKS, MAX_FAILED, find
from components.scoring.judge import JudgeSettings

HELD_OUT_EXAM = "vqa"
"""What the held-out questions are called in scores; they are judged as the benchmark of that name is."""

_OF_A_JUDGE = ("reference", "context", "judge", "judge_runs", "judge_swap", "max_failed")
_OF_EVERY = (
    "benchmark",
    "name",
    "images",
    "follow_links",
    "instruction",
    "max_new_tokens",
    "blank_images",
)
_PATHS = ("data", "questions", "labels", "splits", "images", "reference", "context")


class ExamSettings(Settings):
    """One benchmark and its files: paths, or s3:// URIs, in the formats that docs/evaluation.md lists.

    Where the files lie belongs to the run; they enter the digest by their fingerprints.
    """

    benchmark: str = Field(
        description="Which line of the table: how questions are put, answers read and scores computed"
    )
    name: str = Field(
        "", pattern=r"^(\w[\w.-]*)?$", description="What its scores are called; default: the benchmark's name"
    )
    data: str | None = run_field(
        None,
        description="LLaVA-format JSON or JSONL, or a dataset artifact (its held-out rows)",
    )
    questions: str | None = run_field(None, description="JSONL of question_id, image, text (and category)")
    labels: str | dict[str, str] | None = run_field(
        None,
        description="The right answers, in the benchmark's own format; by split where it has some",
    )
    splits: str | None = run_field(
        None, description="Which ids belong to which list, such as ScienceQA's pid_splits.json"
    )
    split: str = Field("test", description="Which list of splits")
    images: str | None = run_field(None, description="Folder of the pictures; default: beside the questions")
    follow_links: bool | None = run_field(
        None,
        description="Links in its folders that are followed: default those that stay inside; true: all; false: none",
    )
    instruction: str | None = Field(
        None,
        description="The line after each question; empty: none; null: the benchmark's own, unless the text has one",
    )
    style: Literal["CQM-A", "QCM-LEA"] = Field(
        "CQM-A", description="Order of the prompt's parts, of ScienceQA: context, question, options"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens after which an answer is cut; default: the benchmark's own, from 16 to 1024",
    )
    blank_images: bool = Field(False, description="Ask again with blank pictures, and score that too")
    reference: str | None = run_field(None, description="The answers that the judge compares with")
    context: str | None = run_field(None, description="Notes on the pictures, for the judge")
    judge: JudgeSettings | None = Field(
        None, description="Who judges, where a benchmark is judged; null: answers only"
    )
    judge_runs: int = Field(1, ge=1, description="How often everything is judged")
    judge_swap: bool = Field(False, description="Every second run shows the candidate first")
    max_failed: float = Field(
        MAX_FAILED, ge=0, le=1, description="Share of failed judgements above which there is no score"
    )

    @property
    def title(self) -> str:
        """The name under which it is scored."""
        return self.name or self.benchmark

    @property
    def answer_length(self) -> int:
        """Tokens after which an answer is cut."""
        return self.max_new_tokens or find(self.benchmark).answer_length

    @property
    def paths(self) -> dict[str, str]:
        """Every path that is set, by what it is; labels by split."""
        named = {name: getattr(self, name) for name in _PATHS if getattr(self, name) is not None}
        labels = named.pop("labels", {})
        by_split = {"": labels} if isinstance(labels, str) else labels
        return named | {f"labels {split}".strip(): path for split, path in by_split.items()}

    def _changed(self) -> list[str]:
        fields = type(self).model_fields
        return [key for key in fields if getattr(self, key) != fields[key].default]

    @field_validator("benchmark")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BENCHMARKS:
            raise ValueError(f"no such benchmark; known: {', '.join(BENCHMARKS)}")
        return name

    @model_validator(mode="after")
    def _complete(self) -> Self:
        named = self.benchmark if self.title == self.benchmark else f"{self.title} ({self.benchmark})"
        benchmark = find(self.benchmark)
        ways = benchmark.needs
        files = {key for way in ways for key in way}
        given = {key for key in files if getattr(self, key) is not None}
        if not any(given == set(way) for way in ways):
            wanted = ", or ".join(" and ".join(way) for way in ways)
            raise ValueError(f"{named}: give {wanted}")
        read = {*files, *_OF_EVERY, *benchmark.options, *(_OF_A_JUDGE if benchmark.judge else ())}
        if unread := [key for key in self._changed() if key not in read]:
            raise ValueError(f"{named}: it takes no {', '.join(unread)}")
        if benchmark.by_split and not isinstance(self.labels, dict):
            raise ValueError(f"{named}: give labels by split, such as {{random: FILE, popular: FILE}}")
        if not benchmark.by_split and isinstance(self.labels, dict):
            raise ValueError(f"{named}: labels is one file")
        if self.judge is not None and (self.reference is None or self.context is None):
            raise ValueError(f"{named}: a judge needs reference and context")
        for path in self.paths.values():
            refuse_secrets(path, f"a path of {named}")
        return self


def exams_asked(settings: EvaluateSettings) -> list[str]:
    """The names of the exams, as scores and the settings of `register` call them."""
    return [HELD_OUT_EXAM, *(exam.title for exam in settings.benchmarks)]


class EvaluateSettings(Settings):
    """What is asked, and how it is spread over workers."""

    limit: int | None = Field(
        None, ge=2, description="Ask only so many held-out questions, drawn by seed; null: all"
    )
    max_new_tokens: int = Field(16, ge=1, description="Tokens after which a held-out answer is cut")
    seed: int = Field(0, description="Draws the questions under a limit and the wrong pictures")
    benchmarks: tuple[ExamSettings, ...] = Field(
        (), description="Further benchmarks, each a name from the table with its data"
    )
    contamination: Literal["off", "report", "exclude"] = Field(
        "report",
        description="Pictures that the model was trained on: not looked for, reported, or left out of the scores",
    )
    batch_size: int = run_field(32, ge=1, description="Questions that are answered at once by one worker")
    workers: int = run_field(1, ge=1, description="Ray actors, each holding the model")
    gpu: bool = run_field(False, description="Whether each worker takes a GPU")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = exams_asked(self)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"benchmarks: {twice[0]!r} is taken ({HELD_OUT_EXAM!r} are the held-out questions): "
                "give the entry a name"
            )
        return self
