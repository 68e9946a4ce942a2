"""The settings of `filter`. What the paper does not say is a setting here, with its default's reason."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.contract.component import Settings, run_field
from llava.data.schema import GroupSize


class FilterSettings(Settings):
    """Which phrases count, and how many captions each of them keeps."""

    enabled: bool = Field(
        False, description="Whether stage 1 learns from a concept-balanced choice of its captions"
    )
    model: str = Field(
        "en_core_web_sm",
        description="Installed spaCy pipeline that finds noun phrases, by the name it is imported with; its version "
        "is recorded",
    )
    normalise: Literal["text", "lower", "bare", "lemma"] = Field(
        "bare",
        description="When two phrases are one (the paper is silent): text: equal letter by letter; lower: in lower "
        "case; bare: also without leading articles and possessives, pronouns dropped, so that 'a dog' and 'The dog' "
        "are one; lemma: also with the last word in its base form, 'dogs' as 'dog'",
    )
    min_count: int = Field(3, ge=1, description="Phrases of fewer captions are skipped (paper: 3)")
    cap: int = Field(
        100, ge=1, description="A phrase of more captions adds this many of them at random (paper: 100)"
    )
    count_chosen: bool = Field(
        False,
        description="Whether captions that rarer phrases chose count towards the cap. The paper draws from all "
        "captions of a phrase, so by default they do not; true gives a smaller, more even choice",
    )
    seed: int = Field(0, description="Seed of the random captions (the paper names none)")
    rows_per_shard: int = Field(1000, ge=1, description="Rows that one file holds at most")
    rows_per_group: int = Field(256, ge=1, description="Rows of a Parquet row group at most")
    group_bytes: int = Field(2**27, ge=1, description="Image bytes of a Parquet row group at most")
    workers: int | None = run_field(
        None, ge=1, description="Files worked on at once; default one per CPU of the cluster"
    )

    @property
    def group(self) -> GroupSize:
        """Where a row group ends."""
        return GroupSize(self.rows_per_group, self.group_bytes)
