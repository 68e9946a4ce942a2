"""Which modules decide the result of a component, a hash of them, and the record of accepted hashes.

`python -m tests.house.versions` prints the lines that the record lacks. A line is accepted by putting it into
`component_versions.jsonl`: with a higher `version` where the result changed, or with the reason why it did not.

The modules are found, not listed: all that a component's module imports, directly or not, but for those that say how
work is done or told and not what comes of it (`HOW`). Hashed is the syntax tree without docstrings, so that comments,
layout and wording change nothing.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from components.backbones.given import Given
from workflows.stages import STAGES

ROOT = Path(__file__).parents[2]
RECORD = Path("tests/house/component_versions.jsonl")
PACKAGES = ("components", "llava")


def _components() -> dict[str, tuple[str, str]]:
    """File and class of every component: those of the table of stages, and `given`, which stands in for one."""
    found = {stage.component.name: type(stage.component) for stage in STAGES} | {"given": Given}
    return {
        name: (Path(inspect.getfile(kind)).relative_to(ROOT).as_posix(), kind.__name__)
        for name, kind in found.items()
    }


COMPONENTS = _components()
HOW = {
    "components/contract": "stores, leases, manifests and tracking: their own formats have their own tests",
    "components/ray_cluster": "where work runs",
    "components/pages": "what people are shown",
    "components/registry.py": "MLflow's registry",
    "components/training/board.py": "progress",
    "components/training/progress.py": "progress",
    "components/training/observers": "what happens beside the loop",
    "components/training/profiling.py": "traces",
    "components/training/utilisation.py": "a figure that is told",
    "components/training/auto.py": "a choice that changes no result",
    "components/training/candidates.py": "a choice that changes no result",
    "components/training/ways_out.py": "what people are told",
    "components/training/checkpoints.py": "where an interrupted run goes on",
    "components/shard/report.py": "what people are shown",
    "components/shard/quality.py": "what people are shown",
    "components/instruct/report.py": "what people are shown",
    "components/instruct/llm/report.py": "what people are shown",
    "components/filter/report.py": "what people are shown",
    "components/datasets/samples.py": "what people are shown",
    "llava/estimate.py": "a forecast",
    "llava/host_memory.py": "a forecast",
    "llava/errors.py": "messages",
}


def hashes(component: str, root: Path = ROOT) -> dict[str, str]:
    """By path: the hash of each module that decides the component's result."""
    return {path: _hash(root, path) for path in sorted(_closure(root, COMPONENTS[component][0]))}


def combined(component: str, root: Path = ROOT) -> str:
    """One hash of all of them."""
    return _short(json.dumps(hashes(component, root), sort_keys=True))


def version_of(component: str, root: Path = ROOT) -> str:
    """The version that the class says, read from its source."""
    path, name = COMPONENTS[component]
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                target = line.target if isinstance(line, ast.AnnAssign) else None
                if isinstance(target, ast.Name) and target.id == "version":
                    assert isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Constant)
                    return str(line.value.value)
    raise AssertionError(f"{path}: {name} has no version")


def record(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The newest line of each component."""
    lines = (root / RECORD).read_text().splitlines()
    return {line["component"]: line for line in map(json.loads, filter(None, lines))}


def faults(root: Path = ROOT) -> list[str]:
    """What the record does not accept, each with the line that would make it accepted."""
    known, found = record(root), []
    for component in COMPONENTS:
        version, now = version_of(component, root), combined(component, root)
        accepted = known.get(component)
        if accepted is None:
            found.append(
                f"{component}: is not in {RECORD}; add\n{_line(component, version, now, root, 'new')}"
            )
        elif accepted["hash"] != now:
            changed = ", ".join(_changed(accepted, hashes(component, root))) or "its list of modules"
            found.append(
                f"{component}: {changed} changed since version {accepted['version']} was recorded: raise the version, "
                f"or record why the result is the same, by this line in {RECORD}\n"
                f"{_line(component, version, now, root, 'WHY THE RESULT IS THE SAME, OR WHAT CHANGED')}"
            )
        elif accepted["version"] != version:
            found.append(f"{component}: version {version} is not recorded; add\n"
                         f"{_line(component, version, now, root, 'WHAT CHANGED')}")  # fmt: skip
    return found


def _line(component: str, version: str, now: str, root: Path, why: str) -> str:
    # A few letters of each module's hash are enough to name those that changed.
    modules = {path: value[:4] for path, value in hashes(component, root).items()}
    line = {"component": component, "version": version, "hash": now, "why": why, "modules": modules}
    return json.dumps(line)


def _changed(accepted: dict[str, dict[str, str]], now: dict[str, str]) -> Iterator[str]:
    before = accepted.get("modules", {})
    for path in sorted({*before, *now}):
        if before.get(path) != now.get(path, "")[:4]:
            yield path


@cache
def _closure(root: Path, start: str) -> frozenset[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in found or any(path == how or path.startswith(f"{how}/") for how in HOW):
            continue
        found.add(path)
        waiting += _imports(root, path)
    return frozenset(found)


@cache
def _imports(root: Path, path: str) -> tuple[str, ...]:
    """The files of our own packages that a module imports, at its top or inside a function."""
    found: list[str] = []
    for node in ast.walk(ast.parse((root / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in PACKAGES:
                base = name.replace(".", "/")
                found += [each for each in (f"{base}.py", f"{base}/__init__.py") if (root / each).is_file()]
    return tuple(dict.fromkeys(found))


@cache
def _hash(root: Path, path: str) -> str:
    tree = ast.parse((root / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Docstrings, and the texts that stand under attributes.
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return _short(ast.dump(tree))


def _is_text(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    if "--first" in sys.argv:
        print(
            "\n".join(_line(one, version_of(one), combined(one), ROOT, "first record") for one in COMPONENTS)
        )
    else:
        print("\n".join(faults()))
