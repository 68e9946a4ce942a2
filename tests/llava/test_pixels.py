"""Pictures to pixels: what training sees is what the stock processor of the saved folder gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil

from llava import model as models
from llava.choices import Fit
from llava.generate import pixel_values
from llava.pixels import Pixels
from tests.support.tiny_llava import tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("pixels") / "model")


def picture(width: int, height: int) -> Image.Image:
    """Red at the left end, blue at the right end, noise between them."""
    noise = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    noise[:, : width // 8] = (255, 0, 0)
    noise[:, -width // 8 :] = (0, 0, 255)
    return Image.fromarray(noise)


@pytest.mark.parametrize("fit", ["model", "pad", "crop"])
def test_training_pixels_are_those_of_the_saved_stock_processor(
    folder: Path, tmp_path: Path, fit: Fit
) -> None:
    processor = models.load_processor(folder, fit)
    processor.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = Pixels(processor.image_processor)
    for size in ((300, 100), (90, 200), (64, 64), (31, 7)):
        image = picture(*size)
        bytes_in = pixels(image)
        assert (bytes_in.dtype, bytes_in.shape) == (np.uint8, (3, 64, 64))
        ours = pixels.normalise(torch.from_numpy(bytes_in)[None], torch.float32)[0]
        assert torch.allclose(ours, pixel_values(stock, image), atol=1e-6)


def test_pad_shows_the_whole_picture_on_the_mean_colour_and_crop_its_middle(folder: Path) -> None:
    padded, cropped = (
        Pixels(models.load_processor(folder, fit).image_processor)(picture(300, 100))
        for fit in ("pad", "crop")
    )
    mean = np.array(models.load_processor(folder).image_processor.image_mean) * 255
    assert np.allclose(padded[:, :15].reshape(3, -1).T, mean, atol=1)
    assert np.allclose(padded[:, -15:].reshape(3, -1).T, mean, atol=1)
    assert np.allclose(padded[:, 32, 2], (255, 0, 0), atol=2)
    assert np.allclose(padded[:, 32, -3], (0, 0, 255), atol=2)
    ends = [(255, 0, 0), (0, 0, 255)]
    assert not any(np.allclose(cropped[:, 32, column], end, atol=60) for column in (2, -3) for end in ends)


def test_a_strip_is_padded_without_a_canvas_of_its_length_squared(folder: Path) -> None:
    strip = Image.new("RGB", (60_000, 40), (255, 0, 0))
    shown = Pixels(models.load_processor(folder, "pad").image_processor)(strip)
    assert shown.shape == (3, 64, 64)
    assert strip.size == (60_000, 40)


@pytest.mark.parametrize("fit", ["crop", "pad", "square"])
def test_pillow_alone_gives_the_stock_processors_pixels_for_any_shape(fit: str) -> None:
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
    processor = {
        "crop": CLIPImageProcessorPil(**size),
        "pad": LlavaImageProcessorPil(**size, do_pad=True),
        "square": CLIPImageProcessorPil(size={"height": 40, "width": 40}, do_center_crop=False),
    }[fit]
    pixels = Pixels(processor)
    assert pixels._pillow_will_do
    random = np.random.default_rng(3)
    for _ in range(60):
        height, width = random.integers(1, 130, 2)
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert np.array_equal(pixels(image), pixels._stock(image)), (width, height)


def test_a_processor_of_another_kind_is_left_to_itself() -> None:
    class Mirrored(CLIPImageProcessorPil):
        def resize(self, image: np.ndarray, *args: object, **options: object) -> np.ndarray:
            return super().resize(image, *args, **options)[..., ::-1]

    pixels = Pixels(Mirrored(size={"height": 20, "width": 20}, do_center_crop=False))
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    assert not pixels._pillow_will_do
    assert np.array_equal(pixels(image), pixels._stock(image))
