"""What benchmarks read from: files and folders, here or on S3, as copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.contract import open_store
from components.scoring.benchmarks.reading import copy
from llava.errors import RefusedInput
from tests.support.evaluated import picture


def test_of_a_folder_the_texts_are_copied_and_the_pictures_beside_them_are_not(
    root: str, tmp_path: Path
) -> None:
    store = open_store(f"{root}/labels")
    store.write("count/1.txt", b"How many?\tYes\n")
    store.write("count/1.jpg", picture("red"))
    goal = copy(store.uri, "labels", tmp_path)
    assert goal == tmp_path / "labels"
    assert [path.relative_to(goal).as_posix() for path in goal.rglob("*") if path.is_file()] == [
        "count/1.txt"
    ]
    assert (goal / "count" / "1.txt").read_text() == "How many?\tYes\n"


def test_a_file_keeps_its_ending(root: str, tmp_path: Path) -> None:
    open_store(root).write("mine.tsv", b"a\tb\n")
    assert copy(f"{open_store(root).uri}/mine.tsv", "labels random", tmp_path).name == "labels-random.tsv"


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match=r"gone\.json: No such file"):
        copy(str(tmp_path / "gone.json"), "labels", tmp_path / "x")
