"""Rows and texts for the pictures that the stages which make datasets log."""

from __future__ import annotations

from components.contract.store import Folder
from components.datasets.reading import opened
from components.datasets.results import ShardResult
from llava.data.schema import Row


def sample_rows(folder: Folder, result: ShardResult, count: int, split: str = "train") -> list[Row]:
    """Up to `count` rows of a split, spread over its files (from each the first row group)."""
    files = [file["path"] for file in result.files if file["split"] == split]
    chosen = files[:: max(1, len(files) // count)][:count] if files else []
    rows: list[Row] = []
    for number, path in enumerate(chosen):
        share = (count - len(rows)) // (len(chosen) - number)
        with opened(folder, path) as file:
            group = file.table(0)
        step = max(1, group.num_rows // max(1, share))
        rows += group.take(list(range(0, group.num_rows, step)[:share])).to_pylist()
    return rows


def literal(text: str) -> str:
    """The text as matplotlib shows it unchanged: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
