"""Tests lie where one looks for them: beside the name of the module that they are about."""

from __future__ import annotations

from pathlib import Path

from tests.support.repository import REPOSITORY

APART = {
    "tests/benchmarks": "the commands in benchmarks/",
    "tests/drills": "kills, and what takes minutes",
    "tests/house": "the repository itself",
    "tests/k8s": "the manifests in k8s/",
    "tests/recipes": "what docs/extending.md tells people to do",
    "tests/security": "what hostile input and faults of the world must not do",
    "tests/support": "no tests: what they share",
}
OF_A_FOLDER = {
    "tests/components/scoring/benchmarks/test_golden.py": "every benchmark on stored answers",
    "tests/components/scoring/benchmarks/test_joins.py": "files that do not fit, of every benchmark",
    "tests/components/contract/store/test_store.py": "what both stores promise",
}


def mirrored(test: Path) -> bool:
    """Whether a module or package is called as the test, or as its first words."""
    words = test.stem.removeprefix("test_").split("_")
    folder = REPOSITORY / test.parent.relative_to("tests")
    names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    return any((folder / f"{name}.py").is_file() or (folder / name).is_dir() for name in names)


def _tests() -> list[Path]:
    found = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "tests").rglob("test_*.py"))
    return [path for path in found if not any(path.is_relative_to(folder) for folder in APART)]


def test_a_test_is_called_as_its_module_and_lies_where_that_lies() -> None:
    lost = [str(path) for path in _tests() if not mirrored(path) and str(path) not in OF_A_FOLDER]
    assert not lost, f"name them after their module, or move them: {lost}"


def test_an_exception_is_one_that_is_there() -> None:
    assert all((REPOSITORY / path).is_file() for path in OF_A_FOLDER)


def test_helpers_lie_in_support_and_tests_do_not() -> None:
    assert not list((REPOSITORY / "tests/support").rglob("test_*.py"))
    stray = [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "tests").rglob("*.py"))
        if path.stem not in ("conftest", "__init__", "versions")
        and not path.stem.startswith("test_")
        and not path.is_relative_to(REPOSITORY / "tests/support")
    ]
    assert not stray
