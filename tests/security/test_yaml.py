"""Config files from anybody: whatever one holds, the command answers with one line and status 2, within seconds."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from llava.errors import RefusedInput
from tests.support.command import llava
from workflows import config as configs
from workflows import config_files

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGED = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 1}}\n" for n in range(1, 40)
)
FILES: dict[str, tuple[bytes, str]] = {
    "recursive": (b"name: &me [*me]\n", "*me is inside itself"),
    "recursive below": (b"finetune: &me {a: {b: [*me]}}\n", "*me is inside itself"),
    "not UTF-8": (b"name: caf\xe9\n", "not UTF-8"),
    "UTF-16": ("name: tiny\n".encode("utf-16"), "not UTF-8"),
    "deep in brackets": (b"name: " + b"[" * 50_000, "deep"),
    "deep in braces": (b"name: " + b"{a: " * 40_000, "deep"),
    "deep in dashes": (b"- " * 50_000 + b"x\n", "deep"),
    "a bomb": (BOMB.encode(), "values, with aliases written out"),
    "a bomb of merges": (MERGED.encode(), "values, with aliases written out"),
    "long": (b"name: " + b"x" * 300_000, "more than 256 KiB"),
    "a list": (b"- name: tiny\n", "found list"),
    "a text": (b"tiny\n", "found str"),
    "empty": (b"", "found NoneType"),
    "a number as a name": (b"1: 2\n", "expected names of sections, found 1"),
    "nothing as a name": (b"~: 2\n", "expected names of sections, found None"),
    "a number as a name below": (b"name: x\nfinetune: {1: 2}\n", "finetune"),
    "two documents": (b"name: x\n---\nname: y\n", "no YAML"),
    "Python": (b"name: !!python/object/apply:os.system [touch ran]\n", "no YAML"),
    "a control character": (b"name: \x00\n", "no YAML"),
    "a date that is none": (b"name: 2024-99-99\n", "no YAML"),
    "a number too long": (b"name: " + b"9" * 5000 + b"\n", "no YAML"),
    "a list as a key": (b"? [a, b]\n: c\n", "no YAML"),
    "an alias to nothing": (b"name: *nothing\n", "no YAML"),
    "a merge of a text": (b"name: x\nfinetune: {<<: text}\n", "no YAML"),
}


@pytest.fixture(scope="module", autouse=True)
def everything_imported() -> None:
    """The sections' classes take seconds to import, once."""
    configs.config_model()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config_is_one_line_within_a_second(name: str, tmp_path: Path) -> None:
    data, message = FILES[name]
    (tmp_path / "own.yaml").write_bytes(data)
    began = time.process_time()
    with pytest.raises(RefusedInput) as refused:
        configs.load(str(tmp_path / "own.yaml"))
    assert time.process_time() - began < 5
    line = str(refused.value)
    assert message in line and "\n" not in line and len(line) < 20_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["recursive", "not UTF-8", "deep in brackets", "a bomb", "a list", "a date that is none"]
)
def test_the_command_says_it_in_one_line(name: str, tmp_path: Path) -> None:
    data, message = FILES[name]
    (tmp_path / "own.yaml").write_bytes(data)
    ended = llava("train", "own.yaml", cwd=tmp_path)
    assert (ended.status, ended.out) == (2, ""), ended.err
    assert ended.err.count("\n") == 1 and ended.err.startswith("error: own.yaml: ")
    assert message in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml"]


@pytest.mark.parametrize("value", ["[" * 5000, "&me [*me]", "{a: " * 5000, "&a [*a, *a]"])
def test_a_value_on_the_command_line_keeps_the_same_bounds(value: str) -> None:
    with pytest.raises(RefusedInput, match=r"--set finetune\.epochs"):
        configs.load("tiny", [f"finetune.epochs={value}"])


@pytest.mark.parametrize("value", ["9" * 5000, "2024-99-99", "!!python/name:os.system", "\x00"])
def test_a_value_that_is_no_yaml_is_a_text(value: str) -> None:
    with pytest.raises(RefusedInput) as refused:
        configs.load("tiny", [f"finetune.global_batch={value}"])
    assert "finetune.global_batch" in str(refused.value) and len(str(refused.value)) < 1000


def test_aliases_as_people_use_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("a: &usual {lr: 1, decay: 2}\nb: *usual\nc: {<<: *usual, lr: 3}\n")
    assert config_files.read(tmp_path / "own.yaml") == {
        "a": {"lr": 1, "decay": 2},
        "b": {"lr": 1, "decay": 2},
        "c": {"lr": 3, "decay": 2},
    }


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(BOMB.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RefusedInput):
        configs.load(str(tmp_path / "own.yaml"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
