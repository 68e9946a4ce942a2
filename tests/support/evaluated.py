"""What evaluations are made from in tests: an artifact that holds a folder, pictures, questions, a dataset."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from components.contract import Component, Job, Settings
from components.evaluate.heldout_scores import Answered
from llava.data.schema import write_rows

QUESTIONS = 40
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple")
Row = dict[str, Any]


class GivenSettings(Settings):
    """Nothing to set."""


class Given(Component):
    """An artifact that holds a copy of a folder."""

    version: ClassVar[str] = "1"
    Settings: ClassVar[type[Settings]] = GivenSettings

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.source = name, folder  # type: ignore[misc]

    def run(self, job: Job) -> None:
        for path in sorted(self.source.rglob("*")):
            if path.is_file():
                job.folder.upload(path, path.relative_to(self.source).as_posix())


def picture(colour: str) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (48, 40), colour).save(file, "PNG")
    return file.getvalue()


def row(name: str, colour: str, question: str, expected: str, kind: str | None = "colour") -> Row:
    """A row of a dataset: one question about a picture of one colour."""
    return {
        "id": name,
        "image": {"bytes": picture(colour), "path": f"{colour}.png"},
        "width": 48,
        "height": 40,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": expected},
        ],
        "kinds": None if kind is None else [kind],
    }


def dataset(folder: Path, rows: list[Row], train: list[Row] | None = None) -> Path:
    """A dataset in `folder`, its held-out rows in two files."""
    (folder / "heldout").mkdir(parents=True)
    if train:
        (folder / "train").mkdir()
        write_rows(folder / "train" / "part-00000.parquet", train)
    write_rows(folder / "heldout" / "part-00000.parquet", rows[: len(rows) // 2])
    write_rows(folder / "heldout" / "part-00001.parquet", rows[len(rows) // 2 :])
    return folder


def answered(kind: str, right: bool, text: str = "x") -> Answered:
    """A held-out question that is answered in the same words under every condition."""
    conditions = ("right_image", "blank_image", "wrong_image")
    return Answered(
        id="1", kind=kind, question=text, expected=text, wrong_image_of="2",
        answers=dict.fromkeys(conditions, text),
        correct={condition: right and condition == "right_image" for condition in conditions},
        loss=3.0, tokens=2 if right else 4,
    )  # fmt: skip
