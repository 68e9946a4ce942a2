"""Stage 1: the projector alone learns to turn image features into words the language model knows.

Source: v1, section 4.2 and v1.5, table 9; the recipe's numbers stand in the presets.
"""

from typing import ClassVar

from pydantic import Field, model_validator

from components.training.settings import TrainSettings
from components.training.stage import TrainingStage


class PretrainSettings(TrainSettings):
    """Stage 1."""

    template: str = Field("plain", description="Image and caption; the question text is not used")
    global_batch: int = Field(256, gt=0, description="Samples per update, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="Peak rate, after the warm-up")
    enabled: bool = Field(
        True, description="Whether stage 1 runs at all; without it stage 2 starts from a fresh projector"
    )

    @model_validator(mode="after")
    def _projector_only(self) -> "PretrainSettings":
        if self.lora:
            raise ValueError(
                "stage 1 trains the projector alone and has no place for LoRA: set finetune.lora"
            )
        return self


class Pretrain(TrainingStage):
    """Takes `model` and `dataset` (captions), gives a model with a trained projector."""

    name: ClassVar[str] = "pretrain"
    version: ClassVar[str] = "3"
    Settings = PretrainSettings
    trains: ClassVar[tuple[str, ...]] = ("projector",)
    view: ClassVar[str] = "captions"
