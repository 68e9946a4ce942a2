"""A small model, questions to which its own answers are known, and further benchmarks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.evaluation import shapes
from llava import generate
from tests.support.evaluated import COLOURS, QUESTIONS, Given, GivenSettings, Row, dataset, picture, row
from tests.support.tiny_llava import tiny_llava


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    tiny_llava(folder / "model")
    return folder


@pytest.fixture(scope="module")
def known_rows(model_folder: Path) -> list[Row]:
    """40 questions; to every other one the model's own answer is the expected one."""
    model, processor = generate.load(model_folder / "model")
    rows = []
    for number in range(QUESTIONS):
        colour, question = COLOURS[number % len(COLOURS)], f"Which is number {number}?"
        with Image.open(io.BytesIO(picture(colour))) as image:
            (own,) = generate.answer(model, processor, [question], [image], 6)
        expected = f" {own.upper()}. " if number % 2 == 0 else "no answer of this model"
        rows.append(row(f"q{number:03d}", colour, question, expected, "even" if number % 2 == 0 else "odd"))
    return rows


@pytest.fixture
def inputs(run_in: Callable[..., Any], model_folder: Path, known_rows: list[Row], tmp_path: Path) -> Any:
    """A model that was trained on nine pictures, of which the exam shows one too; and the exam."""
    train = [row(f"t{number}", "orange", "?", "!") for number in range(8)] + [row("t8", "red", "?", "!")]
    questions = run_in(
        Given("instruct", dataset(tmp_path / "questions", known_rows, train)), GivenSettings()
    ).artifact
    model = run_in(Given("finetune", model_folder), GivenSettings(), {"dataset": questions}).artifact
    return {"model": model, "questions": questions}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Six scenes of the tiny world in each benchmark's format."""
    return shapes.write(tmp_path_factory.mktemp("exams") / "shapes", 6)
