"""Hostile and odd pictures, made here, each with the one result that `llava/data/images.py` defines for it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image

from llava.data.images import Limits

LIMITS = Limits(max_bytes=1_000_000, min_pixels=16, max_pixels=4_000_000)

Result = str | tuple[int, int]
"""The reason of a refusal, or width and height of the RGB picture."""


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file of a picture."""
    image.save(buffer := io.BytesIO(), format=kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", width: int = 64, height: int = 48) -> Image.Image:
    """A picture that does not compress to nothing."""
    pixels = np.random.default_rng(7).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    depth: int = 8,
    colour: int = 2,
    *,
    before: bytes = b"",
    data: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG chunk by chunk; `data`: the rows, `before` and `after` them other chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(data, 9)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def rows(width: int, height: int, pixel: bytes) -> bytes:
    """The rows of a PNG of one colour."""
    return (b"\0" + pixel * width) * height


def jpeg_that_claims(width: int, height: int) -> bytes:
    """A JPEG whose header has another size than its pixels."""
    data = bytearray(encode(noise(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def with_exif(orientation: int) -> bytes:
    """A JPEG that a phone has turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(noise(), "JPEG", exif=exif)


def frames(count: int, kind: str) -> bytes:
    """An animation."""
    first, *others = [Image.new("RGB", (32, 24), (number % 256, 0, 90)) for number in range(count)]
    return encode(first, kind, save_all=True, append_images=others)


def many_segments() -> bytes:
    """A JPEG behind almost a megabyte of comments."""
    whole = encode(noise(), "JPEG")
    return whole[:2] + (b"\xff\xfe" + struct.pack(">H", 65_000) + bytes(64_998)) * 14 + whole[2:]


def flipped(data: bytes, at: int) -> bytes:
    """The bytes with one of them changed."""
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


_BOMB = zlib.compress(bytes(50_000_000), 9)
_SVG = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aaaaaaaaaa">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>'

_CLAIMED_BY_WEBP = "broken" if PIL.__version__.startswith("12.") else "too-many-pixels"
"""Pillow 12 decodes a WebP as soon as it opens it; 13 reads its size first."""

ODD: dict[str, tuple[Callable[[], bytes], Result]] = {
    "no bytes": (lambda: b"", "empty"),
    "one byte": (lambda: b"\xff", "unknown-format"),
    "zeros": (lambda: bytes(4096), "unknown-format"),
    "a page": (lambda: b"<!doctype html><html>404</html>", "unknown-format"),
    "SVG with an entity": (lambda: _SVG, "unknown-format"),
    "TIFF": (lambda: encode(noise(), "TIFF"), "unknown-format"),
    "PDF": (lambda: encode(noise(), "PDF"), "unknown-format"),
    "ICO": (lambda: encode(noise(), "ICO"), "unknown-format"),
    "PPM": (lambda: encode(noise(), "PPM"), "unknown-format"),
    "HEIC's first bytes": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "unknown-format"),
    "EPS, which would start a program": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "unknown-format",
    ),
    "more bytes than the limit": (lambda: encode(noise(), "JPEG") + bytes(1_000_000), "too-many-bytes"),
    "PNG that claims 1.6 gigapixels": (lambda: png(41_000, 39_000), "too-many-pixels"),
    "PNG that has 400 megapixels in 50 kB": (
        lambda: png(20_000, 20_000, 1, 0, data=bytes(2501 * 20_000)),
        "too-many-pixels",
    ),
    "GIF of 81 megapixels in little more than nothing": (
        lambda: encode(Image.new("L", (9000, 9000)), "GIF"),
        "too-many-pixels",
    ),
    "JPEG that claims 65,535 x 65,535": (lambda: jpeg_that_claims(65_535, 65_535), "too-many-pixels"),
    "GIF that claims 65,535 x 65,535": (
        lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encode(noise("P"), "GIF")[10:],
        "too-many-pixels",
    ),
    "BMP that claims 60,000 x 60,000": (
        lambda: (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
        "too-many-pixels",
    ),
    "WebP that claims 16,384 x 16,384": (
        lambda: (
            b"RIFF"
            + struct.pack("<I", 30)
            + b"WEBPVP8X"
            + struct.pack("<I", 10)
            + b"\0\0\0\0"
            + b"\xff\x3f\0" * 2
            + bytes(8)
        ),
        _CLAIMED_BY_WEBP,
    ),
    "one pixel": (lambda: png(1, 1, data=rows(1, 1, b"abc")), "too-few-pixels"),
    "no width": (lambda: png(0, 8), "unknown-format"),
    "a line of a million pixels": (
        lambda: png(1_000_000, 1, 8, 0, data=rows(1_000_000, 1, b"x")),
        "too-narrow",
    ),
    "JPEG cut in the middle": (lambda: encode(noise(), "JPEG")[:900], "broken"),
    "JPEG that is a header": (lambda: encode(noise(), "JPEG")[:40], "broken"),
    "JPEG that claims more rows than it has, and ends": (lambda: jpeg_that_claims(64, 1000), (64, 1000)),
    "PNG cut in the middle": (lambda: encode(noise(), "PNG")[:3000], "broken"),
    "PNG with a wrong checksum": (lambda: flipped(encode(noise(), "PNG"), 20), "unknown-format"),
    "PNG with noise as its pixels": (lambda: flipped(encode(noise(), "PNG"), 300), "broken"),
    "PNG with text that unpacks to 50 MB": (
        lambda: png(8, 8, data=rows(8, 8, b"abc"), before=chunk(b"zTXt", b"t\0\0" + _BOMB)),
        "broken",
    ),
    "PNG with a colour profile that unpacks to 50 MB": (
        lambda: png(8, 8, data=rows(8, 8, b"abc"), before=chunk(b"iCCP", b"t\0\0" + _BOMB)),
        "broken",
    ),
    "PNG whose rows unpack to 50 MB": (lambda: png(8, 8, data=bytes(50_000_000)), (8, 8)),
    "GIF without a picture": (lambda: encode(noise("P"), "GIF")[:800], "broken"),
    "grey": (lambda: encode(noise("L"), "JPEG"), (64, 48)),
    "one bit": (lambda: encode(noise("1"), "PNG"), (64, 48)),
    "palette": (lambda: encode(noise("P"), "PNG"), (64, 48)),
    "palette with a transparent colour": (lambda: encode(noise("P"), "PNG", transparency=3), (64, 48)),
    "grey with alpha": (lambda: encode(noise("LA"), "PNG"), (64, 48)),
    "alpha": (lambda: encode(noise("RGBA"), "WEBP"), (64, 48)),
    "CMYK": (lambda: encode(noise("CMYK"), "JPEG"), (64, 48)),
    "16 bits grey": (lambda: png(8, 8, 16, 0, data=rows(8, 8, b"\x12\x34")), (8, 8)),
    "16 bits RGB": (lambda: png(8, 8, 16, 2, data=rows(8, 8, b"\x12\x34" * 3)), (8, 8)),
    "16 bits RGBA": (lambda: png(8, 8, 16, 6, data=rows(8, 8, b"\x12\x34" * 4)), (8, 8)),
    "GIF of 300 frames": (lambda: frames(300, "GIF"), (32, 24)),
    "PNG of 20 frames": (lambda: frames(20, "PNG"), (32, 24)),
    "WebP of 20 frames": (lambda: frames(20, "WEBP"), (32, 24)),
    "two pictures in one JPEG": (lambda: frames(2, "MPO"), (32, 24)),
    "progressive JPEG": (lambda: encode(noise(), "JPEG", progressive=True), (64, 48)),
    "turned by EXIF": (lambda: with_exif(6), (48, 64)),
    "EXIF orientation 77": (lambda: with_exif(77), (64, 48)),
    "damaged EXIF": (lambda: encode(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), (64, 48)),
    "JPEG behind a megabyte of comments": (many_segments, (64, 48)),
    "JPEG with a zip behind it": (lambda: encode(noise(), "JPEG") + b"PK\x03\x04" + bytes(500), (64, 48)),
    "JPEG with a page in a comment": (
        lambda: encode(noise(), "JPEG", comment=b"<script>alert(1)</script>"),
        (64, 48),
    ),
}
