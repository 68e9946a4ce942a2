"""The settings of `instruct`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.contract.component import run_field
from components.instruct.llm_settings import TeacherSettings
from components.rule_teacher.rules import ASK
from llava.data.schema import GroupSize


class InstructSettings(TeacherSettings):
    """Who writes, how much about each photo, and what is asked of the held-out ones."""

    teacher: Literal["rules", "llm"] = Field(
        "rules",
        description="Who writes: rules (what captions and boxes say for certain, no model) or llm (a language model "
        "behind base_url)",
    )
    seed: int = Field(0, description="Seed of what is asked, of the types and of where the picture stands")
    per_photo: int = Field(2, ge=1, description="Samples about each photo at most (the paper has about two)")
    turns: int = Field(3, ge=1, description="Questions of a conversation by rules at most")
    kinds: tuple[str, ...] | None = Field(
        None, description="Kinds of questions by rules, such as colour, where, count; null: all"
    )
    conversation_share: float = Field(58, ge=0, description="Weight of conversations among the samples")
    detail_share: float = Field(23, ge=0, description="Weight of detailed descriptions among the samples")
    reasoning_share: float = Field(77, ge=0, description="Weight of complex reasoning among the samples")
    image_position: Literal["random", "first"] = Field(
        "random", description="The picture before the first question, or at random before or after it (paper)"
    )
    heldout_questions: int = Field(
        1000, ge=0, description="Questions about held-out photos at most, spread evenly over their kinds"
    )
    rows_per_group: int = Field(256, ge=1, description="Rows of a Parquet row group at most")
    group_bytes: int = Field(2**27, ge=1, description="Image bytes of a Parquet row group at most")
    max_bad: float = Field(
        0.05, ge=0, le=1, description="Share of photos with nothing to say about over which the run fails"
    )
    workers: int | None = run_field(
        None, ge=1, description="Shards made at once; default one per CPU of the cluster"
    )

    @model_validator(mode="after")
    def _something_to_write(self) -> Self:
        if unknown := sorted(set(self.kinds or ()) - set(ASK)):
            raise ValueError(f"kinds {', '.join(unknown)}: unknown; known: {', '.join(sorted(ASK))}")
        if not any(self.shares.values()):
            raise ValueError(
                "conversation_share, detail_share and reasoning_share are all 0: nothing to write"
            )
        if self.teacher == "llm" and (
            missing := [key for key in ("model", "base_url") if not getattr(self, key)]
        ):
            raise ValueError(f"teacher=llm needs {' and '.join(f'instruct.{key}' for key in missing)}")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each type of sample."""
        return {
            "conversation": self.conversation_share,
            "detail": self.detail_share,
            "reasoning": self.reasoning_share,
        }

    @property
    def group(self) -> GroupSize:
        """Where a row group ends."""
        return GroupSize(self.rows_per_group, self.group_bytes)
