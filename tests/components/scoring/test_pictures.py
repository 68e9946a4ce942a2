"""The blank picture."""

from __future__ import annotations

from pathlib import Path

from components.scoring.pictures import blank
from llava import generate
from tests.support.tiny_llava import tiny_llava


def test_a_blank_picture_has_the_size_of_its_picture_and_the_processors_mean_colour(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "model")
    _, processor = generate.load(tmp_path / "model")
    empty = blank(processor.image_processor, (48, 40))
    assert empty.size == (48, 40)
    assert generate.pixel_values(processor, empty).abs().max() < 0.02
