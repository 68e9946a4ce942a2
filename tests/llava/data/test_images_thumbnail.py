"""Thumbnails: the size that was asked for, upright, and hardly another for a larger original."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from llava.data.images import BadImage, Limits, decode, thumbnail


def jpeg(size: tuple[int, int], orientation: int = 1) -> bytes:
    """Red to green from left to right, black to blue from top to bottom."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([255 - across, across, down], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_thumbnail_is_upright_as_the_picture_is(orientation: int) -> None:
    data = jpeg((320, 240), orientation)
    small = thumbnail(data, 24, 16)
    assert small.size == (24, 16) and small.mode == "RGB"
    expected = decode(data).resize((24, 16), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, int) - np.asarray(expected, int)).mean() < 2


def test_a_larger_original_gives_hardly_another_thumbnail() -> None:
    small, large = (np.asarray(thumbnail(jpeg(size), 9, 9), int) for size in ((160, 120), (1600, 1200)))
    assert np.abs(small - large).max() < 8


def test_what_decode_refuses_has_no_thumbnail() -> None:
    with pytest.raises(BadImage, match="64 x 64 px"):
        thumbnail(jpeg((64, 64)), 9, 9, Limits(max_pixels=100))
    with pytest.raises(BadImage, match="does not decode"):
        thumbnail(jpeg((64, 64))[:-400], 9, 9)
