"""The settings that a source reads: where its samples come from, and what of them is let in."""

from __future__ import annotations

from pydantic import Field

from components.contract.component import Settings, run_field
from llava.data.images import Limits

_READ = Limits()
"""What whoever reads a dataset decodes."""


class DownloadSettings(Settings):
    """How pictures are fetched from the web; none of it changes what a picture is."""

    at_once: int = run_field(64, ge=1, description="Downloads at once in one worker")
    per_host: int = run_field(4, ge=1, description="Downloads at once from one host in one worker")
    timeout: float = run_field(20.0, gt=0, description="Seconds that one try may take, redirects included")
    tries: int = run_field(3, ge=1, description="Tries for what may pass: 408, 429, 5xx, no answer in time")
    longest_pause: float = run_field(
        60.0,
        ge=0,
        description="Seconds between two tries at most; a Retry-After that asks for more ends them",
    )
    redirects: int = run_field(5, ge=0, description="Redirects that are followed")
    user_agent: str = run_field(
        "llava-workflow (research data set download)",
        description="What servers see; put an address in it under which you can be reached",
    )


class SourceSettings(Settings):
    """What a source is asked with: the half of the settings of `shard` that knows no table of sources."""

    source: str = Field(description="Name of the source in the table")
    path: str | None = run_field(
        None,
        description="Data folder (or s3://bucket/prefix) of every source but shapes; its files are fingerprinted",
    )
    captions: str | None = Field(
        None,
        description="coco: captions file inside path; default annotations/captions.json or captions_*.json; "
        "cc3m: the TSV inside path; default the only .tsv there",
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
        description="coco, llava: folder, .zip or .tar of the photos inside path; default images/, else COCO's "
        "own (train2017/ for captions_train2017.json), else an archive of such a name, else path itself",
    )
    roots: tuple[str, ...] = run_field(
        (),
        description="llava, coco: more places of photos, looked at in this order after images: [PREFIX=]PLACE, a "
        "folder, .zip, .tar or s3:// prefix, for the image paths that begin with PREFIX; fingerprinted",
    )
    follow_links: bool | None = run_field(
        None,
        description="Links in path and in roots that are followed: default those that stay inside the folder; true: "
        "all; false: none, and path itself is none",
    )
    files: str | None = Field(
        None,
        description="webdataset, parquet: pattern of the files inside path, such as data/train-*.parquet; "
        "default all .tar, .parquet",
    )
    image_columns: tuple[str, ...] = Field(
        (),
        description="parquet: columns of the picture, or of lists of them; default the only one, or image and "
        "more_images",
    )
    texts: tuple[str, ...] = Field(
        (),
        description="parquet: columns of captions (a text or a list of texts) or of conversations (turns of from "
        "and value)",
    )
    id_column: str | None = Field(
        None, description="parquet: column of the sample's name; default id, else the file's name and the row"
    )
    scenes: int = Field(4000, ge=1, description="shapes: how many scenes are drawn, both splits together")
    seed: int = Field(0, description="Seed of the scenes (shapes) and of the held-out choice (the others)")
    heldout: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="Share of the photos that is held out, by a hash of the photo's name (coco, llava), URL (cc3m) "
        "or bytes (webdataset, parquet); shapes hold out whole combinations instead",
    )
    min_pixels: int = Field(256, ge=1, description="Photos with fewer pixels (width x height) are refused")
    max_pixels: int = Field(
        _READ.max_pixels,
        ge=1,
        le=_READ.max_pixels,
        description="Photos with more pixels are refused, unread; no more than training reads",
    )
    max_image_bytes: int = Field(
        _READ.max_bytes,
        ge=1,
        le=_READ.max_bytes,
        description="Photos whose file has more bytes are refused; no more than training reads",
    )
    max_text: int = Field(
        32_768,
        ge=1,
        description="Characters of one text at most; a longer caption is left out, a turn refused",
    )
    resize: int | None = Field(
        None,
        ge=1,
        description="Short side in px to which larger photos are shrunk (JPEG, quality 90: lossy); default: "
        "every photo keeps its bytes",
    )
    allow_private: bool = Field(
        False, description="cc3m: also fetch from loopback, private and link-local addresses"
    )
    download: DownloadSettings = Field(DownloadSettings(), description="cc3m: how pictures are fetched")

    @property
    def limits(self) -> Limits:
        """What a photo may have."""
        return Limits(self.max_image_bytes, self.min_pixels, self.max_pixels)
