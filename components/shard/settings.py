"""The settings of `shard`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.contract.component import Settings, run_field
from components.contract.store import check_key
from llava.data.images import Limits
from llava.data.schema import GroupSize
from llava.errors import RefusedInput


class ShardSettings(Settings):
    """Where the samples come from, what is let in, and how they are cut into files."""

    source: Literal["shapes", "coco", "llava"] = Field(
        "shapes",
        description="shapes: the tiny world, drawn here; coco: photos with COCO captions and boxes; "
        "llava: the ecosystem's JSON of conversations with its photos",
    )
    path: str | None = run_field(
        None, description="Data folder (or s3://bucket/prefix) of coco and llava; its files are fingerprinted"
    )
    captions: str | None = Field(
        None,
        description="coco: captions file inside path; default annotations/captions.json or captions_*.json",
    )
    instances: str | None = Field(
        None, description="coco: boxes file inside path; default the instances file beside the captions file"
    )
    conversations: str | None = Field(
        None,
        description="llava: conversations file (.json or .jsonl) inside path; default the only one there",
    )
    images: str | None = Field(
        None,
        description="coco, llava: folder of the photos inside path; default images/, else COCO's own "
        "(train2017/ for captions_train2017.json), else path itself",
    )
    scenes: int = Field(4000, ge=1, description="shapes: how many scenes are drawn, both splits together")
    seed: int = Field(0, description="Seed of the scenes (shapes) and of the held-out choice (coco, llava)")
    heldout: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="coco, llava: share of the photos that is held out, by a hash of the photo's name; "
        "shapes hold out whole combinations instead",
    )
    rows_per_shard: int = Field(1000, ge=1, description="Samples that one task and its files hold at most")
    rows_per_group: int = Field(256, ge=1, description="Rows of a Parquet row group at most")
    group_bytes: int = Field(2**27, ge=1, description="Image bytes of a Parquet row group at most")
    min_pixels: int = Field(256, ge=1, description="Photos with fewer pixels (width x height) are refused")
    max_pixels: int = Field(64_000_000, ge=1, description="Photos with more pixels are refused, unread")
    max_image_bytes: int = Field(2**26, ge=1, description="Photos whose file has more bytes are refused")
    max_bad: float = Field(0.05, ge=0, le=1, description="Share of refused samples over which the run fails")
    workers: int | None = run_field(
        None, ge=1, description="Shards made at once; default one per CPU of the cluster"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.source == "shapes" and self.path is not None:
            raise ValueError("path is for source=coco and source=llava; shapes are drawn, not read")
        if self.source != "shapes" and self.path is None:
            raise ValueError(f"source={self.source} needs path, the folder that holds the data")
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

    @property
    def limits(self) -> Limits:
        """What a photo may have."""
        return Limits(self.max_image_bytes, self.min_pixels, self.max_pixels)

    @property
    def group(self) -> GroupSize:
        """Where a row group ends."""
        return GroupSize(self.rows_per_group, self.group_bytes)
