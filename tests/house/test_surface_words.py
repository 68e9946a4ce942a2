"""What belongs to one place: options to the commands that have them, a benchmark's name to its own file."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from components.scoring.benchmarks import BENCHMARKS
from tests.support.repository import REPOSITORY
from workflows.scores import cli

OUTSIDE = (
    "components/evaluate",
    "components/scoring",
    "components/pages",
    "workflows/scores",
    "workflows/summary.py",
)
"""Where a benchmark's name might be asked for."""
NAMED = {
    ("components/evaluate/settings.py", "vqa"): "what the held-out questions are judged as",
    ("components/scoring/questions.py", "captions"): "a column of datasets",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and value of every text in a module, parts of f-strings too; docstrings are none."""
    tree = ast.parse(path.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


def own_options(path: Path) -> set[str]:
    """Options of a module that is a command itself."""
    return set(re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text()))


def options() -> set[str]:
    """The options of `llava score` and `llava compare`."""
    names = {name for command in (cli.score, cli.compare) for name in inspect.signature(command).parameters}
    return {f"--{name.strip('_').replace('_', '-')}" for name in names - {"benchmark", "names"}}


def modules(*folders: str) -> list[Path]:
    found = [REPOSITORY / folder for folder in folders]
    return [path for one in found for path in (sorted(one.rglob("*.py")) if one.is_dir() else [one])]


def test_a_component_never_tells_people_to_give_an_option_of_a_command() -> None:
    assert {"--labels", "--reviews", "--questions", "--splits", "--base-reviews", "--judge"} <= options()
    told = [
        f"{path.relative_to(REPOSITORY)}:{line}: {option}"
        for path in modules("components", "llava")
        for line, text in texts(path)
        for option in sorted(options() - own_options(path))
        if re.search(rf"{option}(?![a-z-])", text)
    ]
    assert not told, "say what is missing by its field, the command knows what it calls it (`Files.called`)"


def test_a_benchmark_is_named_in_its_own_file_alone() -> None:
    named = {
        (path.relative_to(REPOSITORY).as_posix(), text)
        for path in modules(*OUTSIDE)
        if not path.is_relative_to(REPOSITORY / "components/scoring/benchmarks")
        for _, text in texts(path)
        if text in BENCHMARKS
    }
    assert named == set(NAMED), "ask the table (components/scoring/benchmarks)"


def test_no_benchmark_names_another() -> None:
    folder = REPOSITORY / "components/scoring/benchmarks"
    shared = [folder / f"{name}.py" for name in ("benchmark", "reading", "letters", "ptb", "__init__")]
    assert not [path for path in shared for _, text in texts(path) if text in BENCHMARKS]
