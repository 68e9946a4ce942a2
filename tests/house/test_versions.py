"""A component's version cannot be forgotten: a change of the code that decides its result must be accepted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.house import versions
from tests.support.repository import REPOSITORY
from workflows.stages import STAGES


def test_every_change_of_what_decides_a_result_is_accepted_in_the_record() -> None:
    assert not versions.faults(), "\n" + "\n".join(versions.faults())


def test_every_stage_of_the_table_is_guarded() -> None:
    assert {stage.component.name for stage in STAGES} <= set(versions.COMPONENTS)
    for name, (_, cls) in versions.COMPONENTS.items():
        stage = next((one for one in STAGES if type(one.component).__name__ == cls), None)
        assert stage is None or stage.component.version == versions.version_of(name)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code and of the record, to be changed."""
    for name in (*versions.PACKAGES, "tests/house"):
        shutil.copytree(
            REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_changed_line_of_the_rules_is_told_and_accepted_by_one_line(tree: Path) -> None:
    assert versions.faults(tree) == []
    rules = tree / "components/rule_teacher/rules.py"
    edit(rules, 'f"The {name} is in the {place} part of the picture."', 'f"The {name} is at the {place}."')
    clear(tree)
    told = versions.faults(tree)
    # The tiny language model learns from the same rules.
    assert [one.partition(":")[0] for one in told] == ["backbones", "instruct"]
    assert all("components/rule_teacher/rules.py changed since version" in one for one in told)
    with (tree / versions.RECORD).open("a") as record:
        record.write(told[1].split("\n")[1] + "\n")
    clear(tree)
    assert [one.partition(":")[0] for one in versions.faults(tree)] == ["backbones"]


def test_a_comment_or_a_docstring_is_no_change(tree: Path) -> None:
    rules = tree / "components/rule_teacher/rules.py"
    text = rules.read_text()
    rules.write_text(text.replace('"""', '"""Other words. ', 1) + "\n# and a comment\n")
    clear(tree)
    assert versions.faults(tree) == []


def test_a_raised_version_is_recorded_too(tree: Path) -> None:
    edit(tree / "components/pretrain.py", 'version: ClassVar[str] = "3"', 'version: ClassVar[str] = "4"')
    clear(tree)
    (told,) = versions.faults(tree)
    assert told.startswith("pretrain: components/pretrain.py changed since version 3")
    assert '"version": "4"' in told


def clear(tree: Path) -> None:
    for one in (versions._closure, versions._imports, versions._hash):
        one.cache_clear()
