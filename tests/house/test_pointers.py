"""Whoever follows a pointer finds something: files and names that docstrings, comments, messages and pages cite."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.support.repository import REPOSITORY

FILE = re.compile(r"(?<![\w./*<{}-])(?:\.{0,2}/)?[\w-]+(?:/[\w.-]+)*\.(?:py|md)\b(?![\w/(-])")
FOLDER = re.compile(r"`((?:llava|components|workflows|tests|benchmarks|k8s|docs)/[\w./-]*)`")
NAME = re.compile(
    r"`((?:llava|components|workflows|tests|benchmarks)(?:\.\w+)+)(?<!\.json)(?<!\.yaml)(?:\([^`]*\))?`"
)
LINK = re.compile(r"\]\(([^)\s:#]*)#?([^)\s:]*)\)")

ELSEWHERE = {
    "report.md": "a file of an artifact, written by its component",
    "compare.md": "written by `llava compare --out`",
    "eval/models.md": "a file of the MLflow run, written by `register`",
    "benchmarks.NAME.WHAT": "a key of a manifest, for any benchmark",
}
"""What no checkout has, and why it may be cited all the same."""
PLACED = re.compile(r"`(\w+(?:\.\w+)*)`(?: in|,? \()\s*`([\w/]+\.py)`")
"""`NAME` in `FILE`, and `NAME` (`FILE`)."""
PROSE = (".md", ".yaml", ".yml", ".toml", ".sh")
MADE_HERE = re.compile(r"^```\w+ (\S+)$", re.M)
"""A fence of docs/extending.md that names the file which the recipe makes."""


@cache
def files() -> tuple[PurePosixPath, ...]:
    """What git has, or would take up with the next commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return tuple(PurePosixPath(name) for name in listed if (REPOSITORY / name).is_file())


@cache
def names() -> tuple[str, ...]:
    """`files` as they are written."""
    return tuple(path.as_posix() for path in files())


@cache
def texts(path: PurePosixPath) -> tuple[str, ...]:
    """What of a file is written for people."""
    return tuple(_texts(path))


def _texts(path: PurePosixPath) -> Iterator[str]:
    if path.suffix == ".py":
        source = (REPOSITORY / path).read_text()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        yield from (one.string for one in tokens if one.type == tokenize.COMMENT)
        yield from docstrings_and_messages(ast.parse(source))
    elif path.suffix in PROSE or path.name in ("Makefile", "Dockerfile"):
        yield (REPOSITORY / path).read_text()


def docstrings_and_messages(tree: ast.Module) -> Iterator[str]:
    """Strings that stand alone, and those of several words."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (id(node) in alone or " " in node.value.strip())
        ):
            yield node.value


def is_there(path: PurePosixPath, named: str) -> bool:
    """Whether what `path` names is in the repository: from its own folder, in full, or by the end of its path."""
    if (REPOSITORY / path.parent / named).resolve().exists() or (REPOSITORY / named).exists():
        return True
    return any(name.endswith(f"/{named}") for name in names())


@cache
def pointers(pattern: re.Pattern[str]) -> tuple[tuple[PurePosixPath, Any], ...]:
    """(who points, at what), in every text of the repository but this one, whose examples are none."""
    own = PurePosixPath(__file__).name
    return tuple(
        (path, named)
        for path in files()
        if path.name != own
        for text in texts(path)
        for named in pattern.findall(text)
    )


def made_by_recipes() -> set[str]:
    """Files that do not exist until somebody follows a recipe of a page."""
    pages = (text for path in files() if path.suffix == ".md" for text in texts(path))
    return {name for page in pages for name in MADE_HERE.findall(page)}


def test_every_file_and_folder_that_is_cited_is_in_the_repository() -> None:
    known = made_by_recipes() | set(ELSEWHERE)
    # NAME stands for a name that the reader chooses.
    found = [one for pattern in (FILE, FOLDER) for one in pointers(pattern) if "NAME" not in one[1]]
    assert len(found) > 100
    assert not sorted(
        {f"{path}: {named}" for path, named in found if named not in known and not is_there(path, named)}
    )


@cache
def names_of(module: str) -> set[str] | None:
    """What a module of ours has at its top, None where there is no such module."""
    path = REPOSITORY.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.is_file():
        return {one.stem for one in path.iterdir()} if path.is_dir() else None
    found = {one.stem for one in path.iterdir()} if path.is_dir() else set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def leads_somewhere(dotted: str) -> bool:
    """Whether `llava.data.schema` is a module, or `llava.model.PARTS` a name in one."""
    parts = dotted.split(".")
    module = next(n for n in range(len(parts), 0, -1) if names_of(".".join(parts[:n])) is not None)
    return module == len(parts) or parts[module] in (names_of(".".join(parts[:module])) or set())


def test_every_module_and_name_that_is_cited_exists() -> None:
    found = list(pointers(NAME))
    assert found
    lost = [(path, named) for path, named in found if named not in ELSEWHERE and not leads_somewhere(named)]
    assert not sorted({f"{path}: {named}" for path, named in lost})


def test_every_function_that_a_page_places_in_a_file_is_there() -> None:
    placed = [one for path, one in pointers(PLACED) if path.suffix == ".md"]
    assert len(placed) > 20
    assert not sorted({f"{name} in {file}" for name, file in placed if not defines(REPOSITORY / file, name)})


def defines(file: Path, name: str) -> bool:
    """Whether the file has each part of `Class.method`."""
    source = file.read_text()
    return all(
        re.search(rf"^ *(?:async )?(?:def|class) {part}\b|^ *{part}\b[^=\n]*[=:]", source, re.M)
        for part in name.split(".")
    )


def test_what_is_excused_is_still_cited() -> None:
    assert set(ELSEWHERE) <= {named for pattern in (FILE, NAME) for _, named in pointers(pattern)}


def test_every_link_of_a_page_leads_to_a_file_or_a_heading() -> None:
    lost = []
    for path in files():
        for target, heading in LINK.findall((REPOSITORY / path).read_text()) if path.suffix == ".md" else ():
            page = (REPOSITORY / path.parent / target).resolve() if target else REPOSITORY / path
            if not page.exists() or (heading and heading not in headings(page)):
                lost.append(f"{path}: {target}#{heading}")
    assert not lost


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "text", ["see `llava/data/place.py`", "shard_tasks.py", "(design.md)", "../docs/no.md"]
)
def test_a_pointer_to_nothing_is_noticed(text: str) -> None:
    (named,) = FILE.findall(text)
    assert not is_there(PurePosixPath("llava/model.py"), named)
