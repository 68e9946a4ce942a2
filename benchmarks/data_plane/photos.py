"""Photo-like JPEGs: detail at all scales as in photos, so that they compress and decode as photos do; seeded."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

CANVASES = 12
_WORDS = (
    *(
        "a",
        "brown",
        "dog",
        "old",
        "man",
        "red",
        "car",
        "on",
        "the",
        "green",
        "table",
        "under",
        "two",
        "boats",
    ),
    *("near", "of", "water", "with", "small", "white"),
)


def make_photos(folder: Path, count: int, size: tuple[int, int], quality: int = 90) -> None:
    """`count` JPEGs of `size` (width, height) as a COCO folder: `images/`, `annotations/captions.json`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    with ProcessPoolExecutor() as pool:
        write = partial(_write, folder / "images", size, quality)
        for _ in pool.map(write, range(count), chunksize=100):
            pass
    write_captions(folder, count)


def write_captions(folder: Path, count: int) -> None:
    """The captions file of the first `count` photos: two captions each."""
    images = [{"id": number, "file_name": f"{name_of(number)}.jpg"} for number in range(count)]
    notes = [{"image_id": number, "caption": text} for number in range(count) for text in captions(number)]
    path = folder / "annotations" / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))


def name_of(number: int) -> str:
    """The name of a photo."""
    return f"{number:08d}"


def captions(number: int) -> list[str]:
    """Two texts of 10 words."""
    return [
        " ".join(_WORDS[(number * step + place**2) % len(_WORDS)] for place in range(10)) for step in (1, 7)
    ]


def files(folder: Path, count: int) -> Iterator[tuple[str, Path, list[str]]]:
    """(name, file, captions) of the first `count` photos."""
    for number in range(count):
        yield name_of(number), folder / "images" / f"{name_of(number)}.jpg", captions(number)


def _write(folder: Path, size: tuple[int, int], quality: int, number: int) -> None:
    random = np.random.default_rng([1, number])
    canvas = _canvas(int(random.integers(CANVASES)))
    left, top = (int(random.integers(whole - part)) for whole, part in zip(canvas.size, size, strict=True))
    canvas.crop((left, top, left + size[0], top + size[1])).save(
        buffer := io.BytesIO(), format="JPEG", quality=quality
    )
    (folder / f"{name_of(number)}.jpg").write_bytes(buffer.getvalue())


@lru_cache(CANVASES)
def _canvas(number: int) -> Image.Image:
    """Noise whose strength falls with its fineness, 1600 x 1200."""
    random = np.random.default_rng([0, number])
    total = np.zeros((1200, 1600, 3), np.float32)
    for octave in range(8):
        small = random.normal(0, 64 / 1.75**octave, (9 * 2**octave, 12 * 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(small[..., channel])
            total[..., channel] += np.asarray(layer.resize((1600, 1200), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))
