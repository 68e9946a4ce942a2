"""The section `retrain` of the config: how new data is taken in."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RetrainSettings(BaseModel):
    """Read by `llava retrain` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: Literal["pretrain", "champion"] = Field(
        "pretrain",
        description="What is fine-tuned: stage 1's model, on old and new data; or the champion, on the new data and "
        "`replay` of the old",
    )
    replay: float = Field(
        0.2,
        ge=0,
        description="start=champion: times that each old sample is seen in an epoch; 0.2: every fifth",
    )
    max_bad: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of a drop's records set aside over which nothing is trained (status 2)",
    )
    settle: float = Field(
        2.0, ge=0, description="Seconds between two looks at a drop: one that changes in them waits"
    )
