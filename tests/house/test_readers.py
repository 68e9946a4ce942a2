"""Pictures and Parquet files, which anybody may have made, are opened in one place each."""

from __future__ import annotations

import ast

from tests.house.test_loaders import modules
from tests.support.repository import REPOSITORY

OPENERS = {
    "llava/data/images.py": ("Image.open",),
    "llava/data/parquet_files.py": (
        "ParquetFile",
        "ParquetDataset",
        "read_table",
        "read_pandas",
        "read_schema",
        "read_metadata",
        "pandas.read_parquet",
        "pd.read_parquet",
    ),
}
"""Module: the calls that nobody else makes, by how they end."""


def calls(text: str) -> list[str]:
    """What is called in a module, as written."""
    nodes = ast.walk(ast.parse(text))
    return [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]


def opens(call: str, endings: tuple[str, ...]) -> bool:
    return any(call == ending or call.endswith(f".{ending}") for ending in endings)


def test_nobody_else_opens_them() -> None:
    found = [
        f"{path}: {call}"
        for module in modules()
        for call in calls(module.read_text())
        for opener, endings in OPENERS.items()
        if opens(call, endings) and (path := module.relative_to(REPOSITORY).as_posix()) != opener
    ]
    assert not found, f"use {', '.join(OPENERS)}"


def test_the_openers_are_what_they_are_named_for() -> None:
    for opener, endings in OPENERS.items():
        assert any(opens(call, endings) for call in calls((REPOSITORY / opener).read_text()))
    assert opens("PIL.Image.open", ("Image.open",)) and not opens("file.open", ("Image.open",))
