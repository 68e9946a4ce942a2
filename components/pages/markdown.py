"""Markdown for pages that show what models and people wrote: text stays text, whatever it contains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_ACTIVE = re.compile(r"[\\`*_\[\]<>|~$&!#@:]|(?<=www)\.", re.I)


def escape(text: object) -> str:
    """On one line, and so that no renderer finds markup, HTML, links, formulas or a new table cell in it."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", line)


def table(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The lines of a table; cells and heads are escaped, a `Markup` cell stands as it is."""

    def line(cells: Sequence[Any]) -> str:
        shown = (cell.text if isinstance(cell, Markup) else escape(cell) for cell in cells)
        return "| " + " | ".join(shown) + " |"

    return [
        line(list(columns)),
        "| " + " | ".join("---" for _ in columns) + " |",
        *map(line, zip(*columns.values(), strict=True)),
    ]


class Markup:
    """A cell that is Markdown already."""

    def __init__(self, text: str) -> None:
        self.text = text
