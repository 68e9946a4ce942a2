"""What finished shards came to: files, refused samples and figures, kept per shard and added up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pydantic

from components.contract.component import Job
from llava.data.jsonl import from_json, to_jsonl
from llava.errors import LlavaError

REFUSED_FILE = "refused.jsonl"
IDS_IN_NOTES = 20


@dataclass
class Span:
    """Count, sum, least and most of a figure."""

    count: int = 0
    total: float = 0.0
    least: float = 0.0
    most: float = 0.0

    def add(self, other: Span) -> None:
        """Take in another span."""
        if other.count:
            self.least = min(self.least, other.least) if self.count else other.least
            self.most = max(self.most, other.most) if self.count else other.most
            self.count += other.count
            self.total += other.total

    @property
    def mean(self) -> float:
        """The mean; 0 for nothing."""
        return self.total / self.count if self.count else 0.0


@dataclass
class ShardResult:
    """What a finished shard, or several together, came to. Files: path, size, sha256, rows, split.

    `made_of`: a digest of what one shard was made of, "" where nobody asked; `reused`: how many of the shards were
    taken from an earlier artifact.
    """

    files: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    spans: dict[str, Span] = field(default_factory=dict)
    made_of: str = ""
    reused: int = 0

    def add(self, other: ShardResult) -> None:
        """Take in another result."""
        self.files += other.files
        self.refused += other.refused
        self.counts.update(other.counts)
        for name, span in other.spans.items():
            self.spans.setdefault(name, Span()).add(span)
        self.reused += other.reused

    def rows(self, split: str) -> int:
        """Rows of one split."""
        return int(sum(file["rows"] for file in self.files if file["split"] == split))

    @property
    def samples(self) -> int:
        """Rows of all splits and what was refused."""
        return int(sum(file["rows"] for file in self.files)) + len(self.refused)

    def refused_by_reason(self) -> dict[str, int]:
        """How many samples were refused, by reason, the most frequent first."""
        return dict(Counter(one["reason"] for one in self.refused).most_common())

    def counted(self, prefix: str) -> dict[str, int]:
        """The counts whose name begins with `prefix/`, without it, the most frequent first."""
        return {
            name.removeprefix(f"{prefix}/"): count
            for name, count in self.counts.most_common()
            if name.startswith(f"{prefix}/")
        }

    def figures(self) -> dict[str, dict[str, float]]:
        """Count, mean, least and most of everything that was measured."""
        return {
            name: {"count": span.count, "mean": round(span.mean, 3), "least": span.least, "most": span.most}
            for name, span in sorted(self.spans.items())
        }

    def to_json(self) -> bytes:
        """The record of a finished shard."""
        spans = {name: asdict(span) for name, span in self.spans.items()}
        return json.dumps({**vars(self), "spans": spans}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ShardResult:
        """Read back what `to_json` wrote."""
        value = from_json(data)
        spans = {name: Span(**span) for name, span in value["spans"].items()}
        return cls(**{**value, "counts": Counter(value["counts"]), "spans": spans})


class RefusedNote(pydantic.BaseModel):
    """What a manifest says of the samples that were refused for one reason."""

    count: int = pydantic.Field(ge=0)
    ids: list[str]


class Refusals:
    """Holds a run to its share of refused samples."""

    def __init__(self, samples: int, limit: float, key: str) -> None:
        self.samples, self.limit, self.key = samples, limit, key

    def check(self, result: ShardResult) -> None:
        """Raise LlavaError, in one line with reasons and examples, once too many samples are refused."""
        bad = len(result.refused)
        if bad <= self.limit * self.samples:
            return
        examples = {one["reason"]: one for one in reversed(result.refused)}
        told = "; ".join(
            f"{count} x {reason} (such as {examples[reason]['id']}: {examples[reason]['detail']})"
            for reason, count in result.refused_by_reason().items()
        )
        raise LlavaError(
            f"{bad:,} of {self.samples:,} samples refused, limit {self.key}={self.limit:g}: {told}. "
            f"Mend the source, or raise {self.key}"
        )


def note_refused(job: Job[Any], result: ShardResult) -> None:
    """Put the refused samples into the manifest (counts, some ids) and all of them into `refused.jsonl`."""
    by_reason: dict[str, list[str]] = {}
    for one in result.refused:
        by_reason.setdefault(one["reason"], []).append(one["id"])
    job.metrics["refused"] = float(len(result.refused))
    job.notes["refused"] = {
        reason: {"count": len(ids), "ids": ids[:IDS_IN_NOTES]} for reason, ids in sorted(by_reason.items())
    }
    if result.refused:
        job.folder.write(REFUSED_FILE, to_jsonl(result.refused))
