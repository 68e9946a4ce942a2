"""The quality of a dataset: what was refused and why, how large pictures and texts are, what it holds twice.

Sizes, lengths and duplicates come from a second look at the finished shards (a Ray task each), whose results are kept
in the root by the shard's own hash: a dataset that grew has only its new shards looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from components.contract.component import Job
from components.datasets.results import IDS_IN_NOTES, ShardResult
from components.pages import html
from components.pages.html import Html
from components.ray_cluster.spread import spread
from components.shard.fingerprints import CACHE, PICTURES, Fingerprints, groups, near
from components.shard.settings import ShardSettings
from llava.data.images import Limits, read_size, thumbnail
from llava.data.schema import SPLITS, Row, images_of

GROUPS_SHOWN, IDS_OF_A_GROUP = 20, 8
PREVIEW = 160  # px of the longer side


@dataclass(frozen=True)
class Quality:
    """Of a whole dataset. `pictures`: the table of `fingerprints.py`; `split`: (N,) the number in `SPLITS` of each;
    `distinct`: how many pictures differ in their bytes; `in_both`: rows of one picture each that both splits hold;
    `same`, `alike`: groups of rows: samples equal in pictures and texts, and different pictures that look alike."""

    pictures: pa.Table
    split: np.ndarray
    distinct: int
    in_both: list[int]
    same: list[list[int]]
    alike: list[list[int]]

    def counts(self) -> dict[str, int]:
        """What the manifest and MLflow keep of it."""
        return {
            "pictures": self.pictures.num_rows - self.pictures["sha256"].null_count,
            "different pictures": self.distinct,
            "samples twice": sum(len(group) - 1 for group in self.same),
            "pictures that look alike": sum(map(len, self.alike)),
            "groups that look alike": len(self.alike),
            "pictures in both splits": len(self.in_both),
            "groups that look alike in both splits": sum(
                len(set(self.split[group].tolist())) > 1 for group in self.alike
            ),
        }

    def numbers(self, column: str) -> np.ndarray:
        """The values of one column that are there."""
        found: np.ndarray = self.pictures[column].drop_null().to_numpy()
        return found

    def ids(self, found: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
        """The first groups as a table: size, splits, and some ids."""
        some = found[:GROUPS_SHOWN]
        return {
            "samples": [len(group) for group in some],
            "in": [
                " and ".join(SPLITS[number] for number in sorted(set(self.split[group].tolist())))
                for group in some
            ],
            "such as": [
                ", ".join(self.pictures["id"].take(group[:IDS_OF_A_GROUP]).to_pylist()) for group in some
            ],
        }


def examine(job: Job[ShardSettings], result: ShardResult, limits: Limits, workers: int | None) -> Quality:
    """Look at every finished shard and compare all pictures."""
    files = [(file["path"], file["sha256"]) for file in result.files]
    reading = Fingerprints(job.folder, job.workspace.store.sub(CACHE), limits)
    tables: list[Any] = [None] * len(files)
    for number, table in spread(job, "looking at shards", _look, reading, files, workers):
        tables[number] = table
    split = [
        np.full(table.num_rows, SPLITS.index(file["split"]), np.int8)
        for table, file in zip(tables, result.files, strict=True)
    ]
    return compare(
        pa.concat_tables([PICTURES.empty_table(), *tables]), np.concatenate([np.empty(0, np.int8), *split])
    )


def compare(pictures: pa.Table, split: np.ndarray) -> Quality:
    """What the samples have in common."""
    there = np.flatnonzero(pictures["sha256"].is_valid().to_numpy())
    # A picture that several samples share is compared once: by its first sample.
    _, first, number = np.unique(
        _bytes(pictures["sha256"].take(there)), axis=0, return_index=True, return_inverse=True
    )
    splits = np.zeros((len(first), len(SPLITS)), bool)
    splits[number.reshape(-1), split[there]] = True
    one_each = there[np.sort(first)]
    pairs = near(_bytes(pictures["gradients"].take(one_each)), _bytes(pictures["colours"].take(one_each)))
    alike = [one_each[group].tolist() for group in groups(pairs)]
    samples = np.flatnonzero(pictures["sample"].is_valid().to_numpy())
    same = _equal(_bytes(pictures["sample"].take(samples)), samples)
    return Quality(pictures, split, len(first), there[first[splits.all(axis=1)]].tolist(), same, alike)


def note_quality(job: Job[ShardSettings], quality: Quality) -> None:
    """Put the counts into metrics and manifest, and some ids of what the dataset holds twice."""
    counts = quality.counts()
    names = {name: name.replace(" ", "_") for name in counts}
    job.metrics |= {f"duplicates/{names[name]}": float(count) for name, count in counts.items()}
    job.notes["duplicates"] = counts | {
        "such as": {
            title: [
                quality.pictures["id"].take(group[:IDS_OF_A_GROUP]).to_pylist()
                for group in found[:IDS_OF_A_GROUP]
            ]
            for title, found in (
                ("twice", quality.same),
                ("alike", quality.alike),
                ("in both splits", [[one] for one in quality.in_both]),
            )
            if found
        }
    }


def page(result: ShardResult, rows: Sequence[Row], quality: Quality | None) -> bytes:
    """The report as one HTML file; `rows`: samples for the contact sheet."""
    refused: dict[str, list[str]] = {}
    for one in result.refused:
        refused.setdefault(one["reason"], []).append(one["id"])
    reasons = sorted(refused, key=lambda reason: -len(refused[reason]))
    size = sum(file["size"] for file in result.files)
    parts = [
        html.table(
            {
                "": [*SPLITS, "refused", "files", "MiB"],
                "samples": [
                    *(result.rows(split) for split in SPLITS),
                    len(result.refused),
                    len(result.files),
                    size / 2**20,
                ],
            }
        ),
        html.section(
            "Refused samples",
            html.table(
                {
                    "why": reasons,
                    "samples": [len(refused[reason]) for reason in reasons],
                    "such as": [", ".join(refused[reason][:IDS_IN_NOTES]) for reason in reasons],
                }
            )
            if reasons
            else html.text("none"),
        ),
    ]
    if quality is not None:
        parts += _second_look(quality)
    pictures = [
        (preview(cells[0]["bytes"], PREVIEW) if (cells := images_of(row)) else None, _said(row))
        for row in rows
    ]
    parts.append(html.section("Samples", html.sheet(pictures)))
    figures = result.figures()
    parts.append(
        html.section(
            "Figures",
            html.table(
                {
                    "": [*figures],
                    **{
                        key: [one[key] for one in figures.values()]
                        for key in ("count", "mean", "least", "most")
                    },
                }
            ),
        )
    )
    return html.page("Quality of the dataset", parts)  # fmt: skip


def _second_look(quality: Quality) -> list[Html]:
    counts = quality.counts()
    parts = [
        html.section("Width, px", html.histogram(quality.numbers("width"), "px")),
        html.section("Height, px", html.histogram(quality.numbers("height"), "px")),
        html.section("Picture file, KiB", html.histogram(quality.numbers("bytes") / 1024, "KiB")),
        html.section("Words of a sample's texts", html.histogram(quality.numbers("words"), "words")),
        html.section("Duplicates", html.table({"": [*counts], "how many": [*counts.values()]})),
    ]
    if quality.in_both:
        some = quality.pictures["id"].take(quality.in_both[:GROUPS_SHOWN]).to_pylist()
        parts.append(html.section("Pictures in both splits", html.table({"such as": some})))
    if quality.same:
        parts.append(html.section("The same pictures and texts", html.table(quality.ids(quality.same))))
    if quality.alike:
        parts.append(html.section("Pictures that look alike", html.table(quality.ids(quality.alike))))
    return parts


def preview(data: bytes, longest: int) -> Image.Image:
    """The picture with at most `longest` px on its longer side."""
    size = read_size(data)
    scale = min(1.0, longest / max(size.width, size.height))
    return thumbnail(data, max(1, round(size.width * scale)), max(1, round(size.height * scale)))


def _said(row: Row) -> str:
    return " / ".join(row["captions"] or [turn["value"] for turn in row["conversations"] or []])


def _look(reading: Fingerprints, file: tuple[str, str]) -> pa.Table:
    return reading.table(file)


def _bytes(column: pa.ChunkedArray) -> np.ndarray:
    """(N, width) uint8 of a column of `width` bytes each, nothing missing."""
    array, width = column.combine_chunks(), column.type.byte_width
    values = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return values[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def _equal(keys: np.ndarray, places: np.ndarray) -> list[list[int]]:
    """Groups of `places` (N,) whose `keys` (N, width) are equal, the largest first."""
    _, number, times = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    number = number.reshape(-1)
    found: dict[int, list[int]] = {}
    for place in np.flatnonzero(times[number] > 1):
        found.setdefault(int(number[place]), []).append(int(places[place]))
    return sorted(found.values(), key=lambda group: (-len(group), group))
