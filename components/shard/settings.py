"""The settings of `shard`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from components.contract.component import run_field
from components.contract.store import check_key
from components.shard.source_settings import SourceSettings
from components.shard.sources import SOURCES
from llava.data.schema import GroupSize
from llava.errors import RefusedInput

if TYPE_CHECKING:
    SourceName = str
else:
    SourceName = Literal[tuple(SOURCES)]


class ShardSettings(SourceSettings):
    """Where the samples come from, what is let in, and how they are cut into files."""

    source: SourceName = Field(
        "shapes", description="; ".join(f"{name}: {source.about}" for name, source in SOURCES.items())
    )
    rows_per_shard: int = Field(1000, ge=1, description="Samples that one task and its files hold at most")
    rows_per_group: int = Field(256, ge=1, description="Rows of a Parquet row group at most")
    group_bytes: int = Field(2**27, ge=1, description="Image bytes of a Parquet row group at most")
    max_bad: float = run_field(
        0.05,
        ge=0,
        le=1,
        description="Share of refused samples over which the run fails, and a finished dataset is not taken",
    )
    quality: bool = run_field(
        True,
        description="Whether the finished shards are read once more for the report: sizes, text lengths, duplicates",
    )
    workers: int | None = run_field(
        None, ge=1, description="Shards made at once; default one per CPU of the cluster"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} is over max_pixels={self.max_pixels}: nothing fits"
            )
        for name in ("captions", "instances", "conversations", "images"):
            value = getattr(self, name)
            if value is not None:
                try:
                    check_key(value.rstrip("/"))
                except RefusedInput:
                    raise ValueError(f"{name}={value!r} must be a relative path inside path") from None
        return self

    @model_validator(mode="after")
    def _fits_the_source(self) -> Self:
        source = SOURCES[self.source]
        for name, what in source.needs.items():
            if not getattr(self, name):
                raise ValueError(f"source={self.source} needs {name}, {what}")
        for name in sorted({name for one in SOURCES.values() for name in one.own} - source.own):
            if getattr(self, name) != type(self).model_fields[name].default:
                takers = " and source=".join(other for other, one in SOURCES.items() if name in one.own)
                raise ValueError(f"{name} is for source={takers}, not {self.source}")
        return self

    @property
    def group(self) -> GroupSize:
        """Where a row group ends."""
        return GroupSize(self.rows_per_group, self.group_bytes)
