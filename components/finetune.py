"""Stage 2: the projector and the language model learn to answer; the vision tower stays frozen.

Source: v1, section 4.2 and v1.5, table 9; the recipe's numbers stand in the presets.
"""

from typing import ClassVar

from pydantic import Field

from components.contract import Artifact, Component, Job
from components.contract.component import run_field
from components.training import data
from components.training.settings import TrainSettings
from components.training.stage import train_stage


class FinetuneSettings(TrainSettings):
    """Stage 2."""

    template: str = Field(
        "v1", description="How turns are written; one of the table in llava/conversation.py"
    )
    global_batch: int = Field(128, gt=0, description="Samples per update, over all workers")
    learning_rate: float = Field(2e-5, gt=0, description="Peak rate, after the warm-up")
    from_: str | None = run_field(
        None,
        alias="from",
        description="Model to start from instead of pretrain's: models:/NAME@ALIAS, an artifact, or any stock LLaVA "
        "folder, here or as s3://BUCKET/PREFIX; it enters by its digest or fingerprint",
    )


class Finetune(Component):
    """Takes `model` and `dataset` (conversations), gives the LLaVA."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[str] = "2"
    Settings = FinetuneSettings
    parts: ClassVar[tuple[str, ...]] = ("projector", "language_model")
    """What learns: keys of `llava.model.PARTS`."""

    def check(self, settings: FinetuneSettings, inputs: dict[str, Artifact]) -> None:
        """Refuse further datasets that cannot be read, and a held-out loss without held-out samples."""
        data.check(self.name, settings, inputs["dataset"], "conversations")

    def external(self, settings: FinetuneSettings) -> dict[str, str]:
        """The further datasets."""
        return data.external(self.name, settings.extra)

    def run(self, job: Job) -> None:
        train_stage(job, parts=self.parts, view="conversations")
