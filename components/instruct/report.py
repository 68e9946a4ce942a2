"""What `instruct` tells: counts for the manifest, plots and sample conversations for MLflow, the ecosystem's JSON."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contract.component import Job
from components.contract.store import Folder
from components.datasets.reading import rows_of
from components.datasets.results import ShardResult
from components.datasets.samples import literal, sample_rows
from components.instruct.settings import InstructSettings
from llava.data.images import decode
from llava.data.schema import SPLITS, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ECOSYSTEM_FILE = "llava_instruct.json"
SAMPLES_SHOWN = 12
FIRST_WORDS_SHOWN = 25


def report(job: Job[InstructSettings], result: ShardResult) -> None:
    """Fill the job's metrics and notes, log plots and samples, write `llava_instruct.json`."""
    rows = {split: result.rows(split) for split in SPLITS}
    kinds = {split: result.counted(f"kind, {split}") for split in SPLITS}
    types = {split: result.counted(f"type, {split}") for split in SPLITS}
    job.metrics |= {f"rows/{split}": float(count) for split, count in rows.items()}
    job.metrics["rows"] = float(sum(rows.values()))
    job.notes |= {
        "rows": rows,
        "types": types,
        "kinds": kinds,
        "samples_of_a_photo": result.counted("samples of a photo"),
        "heldout_questions": result.counted("heldout questions"),
        "figures": result.figures(),
    }
    write_ecosystem_file(job, result)
    table = [(split, kind, count) for split in SPLITS for kind, count in kinds[split].items()]
    if table:
        columns = zip(("split", "kind", "questions"), map(list, zip(*table, strict=True)), strict=True)
        job.run.table(dict(columns), "kinds.json")
    job.run.figure(count_plot(kinds, result.counted("first words, train")), "questions.png")
    job.run.figure(conversation_sheet(sample_rows(job.folder, result, SAMPLES_SHOWN)), "conversations.png")
    told = ", ".join(f"{count:,} {kind}" for kind, count in types["train"].items())
    refused = sum(result.refused_by_reason().values())
    job.say(
        f"{rows['train']:,} samples ({told}), {rows['heldout']:,} held-out questions, {refused} photos refused"
    )


def write_ecosystem_file(job: Job[InstructSettings], result: ShardResult) -> None:
    """Training samples as `[{"id", "image", "conversations"}]`, photos by their names, a record a line."""
    path = job.scratch / ECOSYSTEM_FILE
    with path.open("w", encoding="utf-8") as out:
        separator = "[\n"
        for file in result.files:
            if file["split"] != "train":
                continue
            for record in _records(job.folder, file["path"]):
                out.write(separator + json.dumps(record, ensure_ascii=False))
                separator = ",\n"
        out.write("\n]\n" if separator != "[\n" else "[]\n")
    job.folder.upload(path, ECOSYSTEM_FILE)
    job.add_file(ECOSYSTEM_FILE, path.stat().st_size, _sha256(path))


def count_plot(kinds: dict[str, dict[str, int]], first_words: dict[str, int]) -> Figure:
    """Bars: questions of each kind, in both splits, and how questions begin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({kind for found in kinds.values() for kind in found})
    for number, (split, found) in enumerate(kinds.items()):
        places = [place + 0.4 * number for place in range(len(names))]
        left.barh(places, [found.get(name, 0) for name in names], height=0.4, label=split)
    left.set_yticks([place + 0.2 for place in range(len(names))], names)
    left.set_title("questions of each kind")
    left.set_xlabel("questions")
    left.legend()
    most = list(first_words.items())[:FIRST_WORDS_SHOWN][::-1]
    right.barh([literal(words) for words, _ in most], [count for _, count in most])
    right.set_title("how questions begin (training)")
    right.set_xlabel("questions")
    return figure


def conversation_sheet(rows: list[Row]) -> Figure:
    """Samples two abreast: the picture, and beside it what is asked and answered."""
    from matplotlib.figure import Figure

    height = max(1, -(-len(rows) // 2))
    figure = Figure(figsize=(16, 3.2 * height), layout="constrained")
    axes: Any = figure.subplots(height, 4, squeeze=False, width_ratios=[1, 1.6, 1, 1.6])
    for axis in axes.flat:
        axis.axis("off")
    for number, row in enumerate(rows):
        picture, text = axes[number // 2][2 * (number % 2) : 2 * (number % 2) + 2]
        if image := row["image"]:
            picture.imshow(decode(image["bytes"]))
        picture.set_title(literal(f"{row['id']} ({row['type'] or 'as given'})"), fontsize=8)
        lines = [
            line
            for turn in row["conversations"] or []
            for line in textwrap.wrap(f"{turn['from']}: {turn['value']}", 64)
        ]
        text.text(0, 1, literal("\n".join(lines[:16])), va="top", fontsize=8)
    return figure


def _records(folder: Folder, key: str) -> Any:
    for row in rows_of(folder, key, ["id", "image.path", "conversations"]):
        image = {"image": row["image"]["path"]} if row["image"] else {}
        yield {"id": row["id"], **image, "conversations": row["conversations"]}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
