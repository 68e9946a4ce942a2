"""Stage 2: the projector and the language model learn to answer; the vision tower stays frozen unless it has a rate.

Source: v1, section 4.2 and v1.5, table 9; the recipe's numbers stand in the presets. A tower that learns is not theirs.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from components.contract.component import run_field
from components.training.settings import TrainSettings
from components.training.stage import TrainingStage


class FinetuneSettings(TrainSettings):
    """Stage 2."""

    template: str = Field("v1", description="How turns are written; one of the table in llava/templates.py")
    global_batch: int = Field(128, gt=0, description="Samples per update, over all workers")
    learning_rate: float = Field(2e-5, gt=0, description="Peak rate, after the warm-up")
    vision_learning_rate: float | None = Field(
        None, gt=0, description="The vision tower's own peak rate; none: the tower stays frozen"
    )
    from_: str | None = run_field(
        None,
        alias="from",
        description="Model to start from instead of pretrain's: models:/NAME@ALIAS, an artifact, or any stock LLaVA "
        "folder, here or as s3://BUCKET/PREFIX; it enters by its digest or fingerprint",
    )

    def parts(self, trains: Sequence[str]) -> tuple[str, ...]:
        """With the vision tower, where it has a rate."""
        return (*super().parts(trains), *(("vision_tower",) if self.vision_learning_rate else ()))

    def own_rates(self) -> dict[str, float]:
        """With that of the vision tower."""
        tower = {"vision_tower": self.vision_learning_rate} if self.vision_learning_rate else {}
        return super().own_rates() | tower


class Finetune(TrainingStage):
    """Takes `model` and `dataset` (conversations), gives the LLaVA."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[str] = "4"
    Settings = FinetuneSettings
    trains: ClassVar[tuple[str, ...]] = ("projector", "language_model")
    view: ClassVar[str] = "conversations"
