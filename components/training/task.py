"""What the driver tells every worker."""

from dataclasses import dataclass
from typing import Any

from components.contract import Artifact, Folder, Guard
from components.training.data import DatasetFiles
from components.training.settings import TrainSettings
from llava.sizes import Training


@dataclass(frozen=True)
class Task:
    """What a worker is told; everything in it can be pickled."""

    settings: TrainSettings
    parts: tuple[str, ...]
    """What trains: "projector", "language_model" (with `settings.lora` its adapters), "vision_tower"."""
    view: str
    model: Artifact
    dataset: Artifact
    extra: tuple[DatasetFiles, ...]
    """Further datasets."""
    folder: Folder
    earlier: tuple[Folder, ...]
    """The folders of earlier tries, where their checkpoints lie."""
    guard: Guard
    tracking_uri: str
    mlflow_run_id: str
    progress_actor: Any
    """The `ProgressActor` actor."""
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration, the user's JSON included."""

    @property
    def training(self) -> Training:
        """What of the language model learns."""
        return self.settings.training(self.parts)
