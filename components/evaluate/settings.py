"""The settings of `evaluate`: the held-out questions, and further benchmarks with their data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.contract.component import Settings, run_field
from components.contract.secrets import refuse_secrets
from components.scoring.benchmarks import MAX_FAILED
from components.scoring.judge import JudgeSettings

HELD_OUT_EXAM = "vqa"
"""What the held-out questions are called in scores; they are judged as the benchmark `vqa` is."""

_LENGTH = {"vqa": 16, "pope": 16, "captions": 64, "scienceqa": 512, "llava-bench": 1024}
_NEEDS = {
    "vqa": (("data",), ("questions", "labels")),
    "captions": (("data",), ("labels",)),
    "pope": (("questions", "labels"),),
    "scienceqa": (("labels",),),
    "llava-bench": (("questions",),),
}
_PATHS = ("data", "questions", "labels", "splits", "images", "reference", "context")


class ExamSettings(Settings):
    """One benchmark and its files: paths, or s3:// URIs, in the formats that docs/evaluation.md lists.

    Where the files lie belongs to the run; they enter the digest by their fingerprints.
    """

    benchmark: Literal["vqa", "pope", "scienceqa", "llava-bench", "captions"] = Field(
        description="Which line of the table: how questions are put, answers read and scores computed"
    )
    name: str = Field(
        "", pattern=r"^(\w[\w.-]*)?$", description="What its scores are called; default: the benchmark's name"
    )
    data: str | None = run_field(
        None,
        description="vqa, captions: LLaVA-format JSON or JSONL, or a dataset artifact (its held-out rows)",
    )
    questions: str | None = run_field(None, description="JSONL of question_id, image, text (and category)")
    labels: str | dict[str, str] | None = run_field(
        None,
        description="The right answers; for pope by split; for scienceqa problems.json; for captions COCO's",
    )
    splits: str | None = run_field(None, description="scienceqa: pid_splits.json")
    split: str = Field("test", description="scienceqa: which list of splits")
    images: str | None = run_field(None, description="Folder of the pictures; default: beside the questions")
    instruction: str | None = Field(
        None,
        description="The line after each question; empty: none; null: the benchmark's own, unless the text has one",
    )
    style: Literal["CQM-A", "QCM-LEA"] = Field("CQM-A", description="scienceqa: order of the prompt's parts")
    max_new_tokens: int | None = Field(
        None, ge=1, description=f"Tokens after which an answer is cut; default by benchmark: {_LENGTH}"
    )
    blank_images: bool = Field(False, description="Ask again with blank pictures, and score that too")
    reference: str | None = run_field(
        None, description="llava-bench: the answers that the judge compares with"
    )
    context: str | None = run_field(None, description="llava-bench: notes on the pictures, for the judge")
    judge: JudgeSettings | None = Field(None, description="llava-bench: who judges; null: answers only")
    judge_runs: int = Field(1, ge=1, description="llava-bench: how often everything is judged")
    judge_swap: bool = Field(False, description="llava-bench: every second run shows the candidate first")
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
        return self.max_new_tokens or _LENGTH[self.benchmark]

    @property
    def paths(self) -> dict[str, str]:
        """Every path that is set, by what it is; labels by split."""
        named = {name: getattr(self, name) for name in _PATHS if getattr(self, name) is not None}
        labels = named.pop("labels", {})
        by_split = {"": labels} if isinstance(labels, str) else labels
        return named | {f"labels {split}".strip(): path for split, path in by_split.items()}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        named = self.benchmark if self.title == self.benchmark else f"{self.title} ({self.benchmark})"
        ways = _NEEDS[self.benchmark]
        if not any(all(getattr(self, key) is not None for key in way) for way in ways):
            wanted = ", or ".join(" and ".join(way) for way in ways)
            raise ValueError(f"{named}: give {wanted}")
        if self.benchmark == "pope" and not isinstance(self.labels, dict):
            raise ValueError(f"{named}: give labels by split, such as {{random: FILE, popular: FILE}}")
        if self.benchmark != "pope" and isinstance(self.labels, dict):
            raise ValueError(f"{named}: labels is one file")
        if self.judge is not None and (self.reference is None or self.context is None):
            raise ValueError(f"{named}: a judge needs reference and context")
        for path in self.paths.values():
            refuse_secrets(path, f"a path of {named}")
        return self


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
        names = [HELD_OUT_EXAM, *(exam.title for exam in self.benchmarks)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"benchmarks: {twice[0]!r} is taken ({HELD_OUT_EXAM!r} are the held-out questions): "
                "give the entry a name"
            )
        return self
