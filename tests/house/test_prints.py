"""What is printed passes `say` or `tell`, which leave a terminal nothing to obey; JSON escapes it by itself."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.repository import REPOSITORY

ALLOWED = {
    "components/backbones/tiny.py": "a maker's command: its own figures",
    "components/contract/console.py": "the mechanism",
    "components/scoring/science_data.py": "a maker's command: its own error",
    "workflows/failures.py": "the mechanism for the last line",
}


def _is_json(call: ast.Call) -> bool:
    inner = call.args[0] if call.args else None
    return (
        isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Attribute)
        and inner.func.attr == "dumps"
        and not any(keyword.arg == "ensure_ascii" for keyword in inner.keywords)
    )


def _prints(path: Path) -> list[str]:
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    return [f"{path.relative_to(REPOSITORY)}:{call.lineno}" for call in calls if not _is_json(call)]


def test_nothing_else_prints() -> None:
    files = [
        path for name in ("llava", "components", "workflows") for path in (REPOSITORY / name).rglob("*.py")
    ]
    found = [
        line
        for path in files
        if path.relative_to(REPOSITORY).as_posix() not in ALLOWED
        for line in _prints(path)
    ]
    assert not found, f"use components.contract.say or tell: {found}"


def test_an_exception_is_one_that_is_there() -> None:
    assert all(_prints(REPOSITORY / path) for path in ALLOWED)
