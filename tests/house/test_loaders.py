"""One module loads anything with transformers: there is no second place where code of a model folder could run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.repository import REPOSITORY

LOADER = "llava/pretrained.py"
RENDERERS = ("llava/rendering_process.py", "llava/generate.py")
PACKAGES = ("llava", "components", "workflows")
LOADS = ("from_pretrained", "from_config", "load_adapter", "get_class_from_dynamic_module")
"""Attributes and functions of transformers that read a folder."""
UNSAFE = ("trust_remote_code=True", "weights_only=False", "use_safetensors=False")
RENDERS = ("apply_chat_template", "render_jinja_template", "from_string", "_compile_jinja_template")
"""What runs a chat template in this process."""


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every name, attribute, import and keyword argument of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def found(wanted: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(REPOSITORY)}:{line}: {name}"
        for path in modules()
        if path.relative_to(REPOSITORY).as_posix() not in allowed
        for line, name in names(path)
        if name in wanted
    ]


def auto_classes() -> tuple[str, ...]:
    import transformers

    return tuple(name for name in dir(transformers) if name.startswith("Auto"))


def test_nobody_else_loads_with_transformers() -> None:
    assert len(auto_classes()) > 20
    assert not found((*LOADS, *auto_classes()), (LOADER,)), f"load it through {LOADER}"


def test_code_and_pickles_are_never_asked_for() -> None:
    assert not found(UNSAFE)
    every = [text for _, text in names(REPOSITORY / LOADER)]
    assert "use_safetensors=True" in every
    assert every.count("from_pretrained") == sum(text == "None=_LOCAL" for text in every) > 0


def test_a_chat_template_is_rendered_in_a_process_of_its_own() -> None:
    assert not found(RENDERS, RENDERERS[:1]), "render it through llava/rendering.py"
