"""Regular expressions that meet text from outside take time in proportion to its length.

Every expression of the packages is found, by its module's attributes or in a call, and gets long texts that are made to
send it back and forth.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import components
import llava
import workflows
from components.instruct.llm import checks
from components.instruct.llm.parse import Pair, Unusable, parse
from tests.support.long_inputs import TooSlow, texts, within
from tests.support.repository import REPOSITORY

SECONDS = 0.7
"""Of processor time for 40 KB. A quadratic expression takes several times that."""
SEARCHES = ("search", "sub", "subn", "findall", "finditer", "split")
DYNAMIC = {
    "components/contract/manifest.py": "the name of a folder of our own",
    "components/instruct/llm/checks.py": "names of categories, escaped: below",
    "components/rule_teacher/rules.py": "names of categories of our own",
    "components/training/utilisation.py": "names of GPUs, in the name of a GPU",
    "llava/control_tokens.py": "tokens, escaped",
    "llava/export.py": "names of weights, by a table of our own",
    "llava/templates.py": "tokens, escaped",
    "llava/text_tokenizer.py": "tokens, escaped",
}
"""Modules that make expressions while they run."""


class Found(NamedTuple):
    where: str
    pattern: re.Pattern[str]
    searched: bool
    """Whether it may begin anywhere in a text."""


def source(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files() -> Iterator[Path]:
    for package in (llava, components, workflows):
        yield from sorted(Path(package.__path__[0]).rglob("*.py"))


def patterns_in(value: Any) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        yield from patterns_in(tuple(value.values()))
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from patterns_in(one)


def of_modules() -> Iterator[Found]:
    text = "\n".join(path.read_text() for path in files())
    for package in (llava, components, workflows):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name == "llava.rendering_process":
                continue  # a program
            for name, value in vars(importlib.import_module(info.name)).items():
                alone = isinstance(value, re.Pattern)
                searched = not alone or re.search(rf"\b{name}\.(?:{'|'.join(SEARCHES)})\b", text)
                for pattern in patterns_in(value):
                    yield Found(f"{info.name}.{name}", pattern, bool(searched))


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Calls such as `re.sub(...)`, and `re.compile(...)` inside a function."""
    for path in files():
        tree = source(path)
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            if (
                isinstance(called, ast.Attribute)
                and ast.unparse(called.value) == "re"
                and called.attr != "escape"
            ):
                assert isinstance(node, ast.Call)
                if called.attr != "compile" or id(node) in inside:
                    yield path, node


def flags_of(call: ast.Call) -> re.RegexFlag:
    given = [*call.args[1:], *(keyword.value for keyword in call.keywords if keyword.arg == "flags")]
    names = re.findall(r"\bre\.([A-Z]+)\b", " ".join(ast.unparse(one) for one in given))
    flags = re.RegexFlag(0)
    for name in names:
        flags |= re.RegexFlag[name]
    return flags


def of_calls() -> Iterator[Found]:
    for path, call in calls():
        pattern = call.args[0]
        if isinstance(pattern, ast.Constant):
            assert isinstance(call.func, ast.Attribute)
            where = f"{path.relative_to(REPOSITORY)}:{call.lineno}"
            yield Found(where, re.compile(pattern.value, flags_of(call)), call.func.attr in SEARCHES)


@cache
def found() -> tuple[Found, ...]:
    known: dict[tuple[str, int, bool], Found] = {}
    for one in (*of_modules(), *of_calls()):
        known.setdefault((one.pattern.pattern, one.pattern.flags, one.searched), one)
    return tuple(known.values())


def slow(one: Found) -> str | None:
    """The beginning of a text that takes too long; None where there is none."""
    for text in texts(one.pattern):
        ways: list[Callable[[str], Any]] = [one.pattern.match, one.pattern.fullmatch]
        if one.searched:
            ways = [lambda text: list(one.pattern.finditer(text))]
        for way in ways:
            try:
                within(SECONDS, lambda way=way, text=text: way(text))  # type: ignore[misc]
            except TooSlow:
                return f"{one.where}: {text[:30]!r}... {text[-5:]!r}"
    return None


@pytest.mark.slow
def test_what_is_quadratic_would_be_found() -> None:
    for pattern in (r"^\s*x", r"<\|.*?\|>", r"<\s*/?\s*a>", r"(?:a|b)*c", r"\w+@"):
        assert slow(Found("here", re.compile(pattern, re.M), True)), pattern
    assert slow(Found("here", re.compile(r"question[ \t]*\**[ \t]*:"), False))


@pytest.mark.drill
def test_every_expression_takes_time_in_proportion_to_the_text() -> None:
    assert len(found()) > 40
    assert not [told for one in found() if (told := slow(one))]


def test_expressions_that_are_made_at_run_time_are_known() -> None:
    made = {
        path.relative_to(REPOSITORY).as_posix()
        for path, call in calls()
        if not isinstance(call.args[0], ast.Constant)
    }
    assert made == set(DYNAMIC)


@pytest.mark.parametrize("text", ["\n" * 40_000, " " * 40_000, "<" + " " * 40_000, "<|" * 20_000, "two " * 10_000,
                                  "how many " * 5_000, "Answer" + " \t" * 20_000, "* " * 20_000])  # fmt: skip
def test_a_teachers_answer_is_judged_in_time(text: str) -> None:
    def judge() -> None:
        for kind in ("conversation", "detail"):
            try:
                pairs = parse(kind, text, "stop")
            except Unusable:
                pairs = [Pair(text, text)]
            checks._of_pair(pairs[0], 10**6, None, True)
        names = checks._names(("dog", "cat"))
        list(names.counted.finditer(text))
        names.asked_many.search(text)
        names.asked_any.match(text)

    within(SECONDS, judge)
