"""What `shard` tells about its dataset: a summary for the manifest, tables, a page and a contact sheet for MLflow."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from components.contract.component import Job
from components.datasets.results import ShardResult
from components.datasets.samples import literal, sample_rows
from components.pages import html
from components.shard.quality import examine, note_quality, page, preview
from components.shard.settings import ShardSettings
from llava.data.schema import SPLITS, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, SHEET = "report/quality.html", "report/samples.png"
SHEET_COLUMNS, SHEET_ROWS = 6, 4
SHEET_PREVIEW = 240  # px of the longer side: a little more than is printed
CATEGORIES_IN_NOTES = 20


def report(job: Job[ShardSettings], result: ShardResult) -> None:
    """Fill the job's metrics and notes, and log the pictures."""
    rows = {split: result.rows(split) for split in SPLITS}
    size = sum(file["size"] for file in result.files)
    job.metrics |= {f"rows/{split}": float(count) for split, count in rows.items()}
    job.metrics |= {"rows": float(sum(rows.values())), "bytes": float(size)}
    categories = result.counted("category")
    job.notes |= {
        "rows": rows,
        "bytes": size,
        "figures": result.figures(),
        "objects": {
            "count": sum(categories.values()),
            "categories": len(categories),
            "most frequent": dict(list(categories.items())[:CATEGORIES_IN_NOTES]),
            **result.counted("objects"),
        },
        "left_out": result.counted("boxes-left-out")
        | {f"captions: {reason}": count for reason, count in result.counted("captions-left-out").items()}
        | {f"files: {reason}": count for reason, count in result.counted("files-left-out").items()}
        | _listed_twice(result),
    }
    if resized := result.counts.get("photos/resized"):
        job.notes["resized"] = resized
    quality = (
        examine(job, result, job.settings.limits, job.settings.workers) if job.settings.quality else None
    )
    if quality is not None:
        note_quality(job, quality)
    samples = sample_rows(job.folder, result, SHEET_COLUMNS * SHEET_ROWS)
    html.publish(job, SHEET, html.drawn(contact_sheet(samples)))
    html.publish(job, PAGE, page(result, samples, quality))
    if categories:
        table: dict[str, list[Any]] = {"category": [*categories], "objects": [*categories.values()]}
        job.run.table(table, "categories.json")
    refused = result.refused_by_reason()
    told = ", ".join(f"{count} x {reason}" for reason, count in refused.items()) or "none"
    job.say(f"{rows['train']:,} rows for training, {rows['heldout']:,} held out, refused: {told}")


def contact_sheet(rows: list[Row]) -> Figure:
    """Pictures in a grid, each over its first caption or its first question."""
    from matplotlib.figure import Figure

    height = max(1, -(-len(rows) // SHEET_COLUMNS))
    figure = Figure(figsize=(2.6 * SHEET_COLUMNS, 3.0 * height), layout="constrained")
    axes: Any = figure.subplots(height, SHEET_COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        if image := row["image"]:
            axis.imshow(preview(image["bytes"], SHEET_PREVIEW))
        said = row["captions"] or [turn["value"] for turn in row["conversations"] or []] or [""]
        axis.set_title(literal("\n".join(textwrap.wrap(said[0], 34)[:3])), fontsize=8)
    return figure


def _listed_twice(result: ShardResult) -> dict[str, int]:
    count = result.counts.get("photos-listed-twice", 0)
    return {"photos-listed-twice": count} if count else {}
