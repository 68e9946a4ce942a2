"""Stage 2: the projector and the language model learn to answer; the vision tower stays frozen.

Source: v1, section 4.2 and v1.5, table 9; the recipe's numbers stand in the presets.
"""

from typing import ClassVar

from pydantic import Field

from components.contract import Component, Job
from components.training.fit import train_stage
from components.training.settings import TrainSettings


class FinetuneSettings(TrainSettings):
    """Stage 2."""

    template: str = Field(
        "v1", description="How turns are written; one of the table in llava/conversation.py"
    )
    global_batch: int = Field(128, gt=0, description="Samples per update, over all workers")
    learning_rate: float = Field(2e-5, gt=0, description="Peak rate, after the warm-up")


class Finetune(Component):
    """Takes `model` and `dataset` (conversations), gives the LLaVA."""

    name: ClassVar[str] = "finetune"
    version: ClassVar[str] = "1"
    Settings = FinetuneSettings

    def run(self, job: Job) -> None:
        train_stage(job, parts=("projector", "language_model"), view="conversations")
