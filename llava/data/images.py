"""Safe decoding: bytes of unknown origin to an upright RGB picture, or a `BadImage` that says why not.

What is checked before any pixel is decoded: the number of bytes, the format (by content, against an
allow-list) and the number of pixels in the header.

| file | result |
|---|---|
| JPEG, PNG, WebP, GIF, BMP, whatever the file's name says | read; the content alone tells the format |
| grey, palette, 1 bit, CMYK | RGB by Pillow's own conversion |
| alpha, a transparent colour | laid over white |
| 16 bits a channel | the high byte |
| animation, several pictures in one | the first |
| EXIF orientation | applied to pixels and size; damaged EXIF is ignored |
| no bytes | `empty` |
| any other format (SVG, TIFF, HEIC, PDF, HTML ...), a header that makes no sense | `unknown-format` |
| more bytes than `Limits.max_bytes` | `too-many-bytes` |
| more pixels than `Limits.max_pixels` (decompression bombs) | `too-many-pixels` |
| fewer pixels than `Limits.min_pixels` | `too-few-pixels` |
| one side more than `Limits.max_ratio` times the other | `too-narrow` |
| cut off, damaged, metadata that unpacks to megabytes | `broken` |
| a JPEG damaged inside, where the decoder does not notice: the format has no checksum | what the decoder makes of it |
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

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
_QUALITY = 90


class BadImage(LlavaError):
    """A picture that was refused. `reason` is a short key to count by; the text is for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.reason, str(self))


@dataclass(frozen=True)
class Limits:
    """What a picture may have: bytes of the file, pixels (width x height), long side over short side.

    The last since a model's processor may enlarge the short side: 1 x 1,000,000 px would become gigabytes.
    """

    max_bytes: int = 64 * 2**20
    min_pixels: int = 1
    max_pixels: int = 64_000_000
    max_ratio: float = 100.0


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


def prove(data: bytes, limits: Limits | None = None) -> Size:
    """The upright size of a picture that `decode` will decode. Raises `BadImage` where `decode` does.

    A JPEG is decoded at an eighth of its size: every coded bit is read as for the whole, and most of the arithmetic
    on pixels is saved.
    """
    image, orientation = _open(data, limits or Limits())
    width, height = image.size
    if orientation in _SWAPS_SIDES:
        width, height = height, width
    try:
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        _to_rgb(image)
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        raise BadImage("broken", f"{image.format} image does not decode: {error}") from error
    return Size(width, height, orientation)


def shrink(data: bytes, short_side: int, limits: Limits | None = None) -> tuple[bytes, Size]:
    """A smaller upright JPEG whose short side has `short_side` px, and its size. Raises `BadImage`.

    Lossy: scaled with a bicubic filter, compressed with quality 90. Large JPEGs are decoded at a half, a quarter
    or an eighth of their size, never below the one that is wanted.
    """
    image, orientation = _open(data, limits or Limits())
    width, height = image.size
    scale = short_side / min(width, height)
    goal = (max(1, round(width * scale)), max(1, round(height * scale)))
    upright = _scaled(image, orientation, goal, Image.Resampling.BICUBIC)
    upright.save(buffer := io.BytesIO(), format="JPEG", quality=_QUALITY)
    return buffer.getvalue(), Size(*upright.size, 1)


def thumbnail(data: bytes, width: int, height: int, limits: Limits | None = None) -> Image.Image:
    """An upright RGB picture of `width` x `height` px, for comparing and showing. Raises `BadImage`.

    Quick: JPEGs are decoded at down to an eighth of their size, but at four times the wanted one at least, so that
    the result hardly depends on the size of the original.
    """
    image, orientation = _open(data, limits or Limits())
    goal = (height, width) if orientation in _SWAPS_SIDES else (width, height)
    return _scaled(image, orientation, goal, Image.Resampling.BICUBIC, least=4)


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
    except UnidentifiedImageError as error:
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
    if max(width, height) > limits.max_ratio * min(width, height):
        raise BadImage(
            "too-narrow", f"image is {width:,} x {height:,} px; sides may differ {limits.max_ratio:g}-fold"
        )
    return image, _orientation(image)


def _scaled(
    image: Image.Image, orientation: int, goal: tuple[int, int], resampling: Image.Resampling, least: int = 1
) -> Image.Image:
    """Decoded no larger than `least` times `goal` needs, brought to it, then turned upright."""
    try:
        image.draft("RGB", (least * goal[0], least * goal[1]))
        image.load()
        small = _to_rgb(image).resize(goal, resampling)
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        raise BadImage("broken", f"{image.format} image does not decode: {error}") from error
    return small.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else small


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
        white = Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")
