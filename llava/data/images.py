"""Safe decoding: bytes of unknown origin to an upright RGB picture, or a `BadImage` that says why not.

What is checked before any pixel is decoded: the number of bytes, the format (by content, against an
allow-list) and the number of pixels in the header. Results are defined for every mode: alpha is laid over
white, 16-bit keeps its high byte, palette, grey and CMYK go through Pillow's own conversion, EXIF orientation
is applied, and of an animation the first frame counts.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from llava.errors import LlavaError

# Names of Pillow's openers. A multi-picture JPEG (MPO, from phones) comes in through "JPEG".
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


class BadImage(LlavaError):
    """A picture that was refused. `reason` is a short key to count by; the text is for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.reason, str(self))


@dataclass(frozen=True)
class Limits:
    """What a picture may have: bytes of the file, pixels (width x height)."""

    max_bytes: int = 64 * 2**20
    min_pixels: int = 1
    max_pixels: int = 64_000_000


@dataclass(frozen=True)
class Size:
    """Width and height in pixels of the upright picture, and the file's own EXIF orientation (1..8)."""

    width: int
    height: int
    orientation: int


def decode(data: bytes, limits: Limits | None = None) -> Image.Image:
    """Decode `data` to an upright RGB picture of the size that `read_size` states.

    Raises `BadImage`; a truncated file is refused, never filled up with grey.
    """
    image, orientation = _open(data, limits or Limits())
    try:
        image.load()
        rgb = _to_rgb(image)
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        raise BadImage("broken", f"{image.format} image does not decode: {error}") from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def read_size(data: bytes, limits: Limits | None = None) -> Size:
    """Read the upright size from the header alone; no pixel is decoded. Raises `BadImage`."""
    image, orientation = _open(data, limits or Limits())
    width, height = image.size
    if orientation in _SWAPS_SIDES:
        width, height = height, width
    return Size(width, height, orientation)


def _open(data: bytes, limits: Limits) -> tuple[Image.Image, int]:
    if not data:
        raise BadImage("empty", "image has no bytes")
    if len(data) > limits.max_bytes:
        raise BadImage("too-many-bytes", f"image has {len(data):,} bytes; limit {limits.max_bytes:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage("unknown-format", f"image is none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too-many-pixels", f"image is far over {limits.max_pixels / 1e6:g} MP") from error
    except Exception as error:
        raise BadImage("broken", f"image has an unreadable header: {error}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        limit = f"limit {limits.max_pixels / 1e6:g} MP"
        raise BadImage("too-many-pixels", f"image is {width:,} x {height:,} px; {limit}")
    if width * height < limits.min_pixels:
        raise BadImage(
            "too-few-pixels", f"image is {width} x {height} px; at least {limits.min_pixels:,} in all"
        )
    return image, _orientation(image)


def _orientation(image: Image.Image) -> int:
    # Pillow looks for a PNG's EXIF behind the pixels too, by decoding them; only what the header holds counts
    # here, so that `read_size` and `decode` always agree.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not make the pixels wrong
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")  # also turns the file's own class into a plain picture
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
