"""Safe decoding: every mode has one defined result, everything else is refused with a reason."""

import io
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.images import BadImage, Limits, decode, prove, read_size, shrink
from tests.support.odd_images import LIMITS, ODD
from tests.support.repository import REPOSITORY, SHARED

PHOTOS = SHARED / "data" / "coco" / "images"
needs_photos = pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="no real photos: tests/support/repository.py names the folder"
)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    image.save(buffer := io.BytesIO(), format=kind, **options)
    return buffer.getvalue()


def halves(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def left_and_right(data: bytes) -> tuple:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((5, 10)), image.getpixel((35, 10))


@needs_photos
def test_real_photos_decode_at_the_size_that_the_header_states() -> None:
    for path in sorted(PHOTOS.glob("*.jpg"))[:8]:
        data = path.read_bytes()
        size = read_size(data)
        assert decode(data).size == (size.width, size.height)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP"])
def test_every_lossless_format_keeps_its_colours(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(halves("RGB", (255, 0, 0), (0, 0, 255)), kind, **options)
    assert left_and_right(data) == ((255, 0, 0), (0, 0, 255))


def test_cmyk_jpeg_becomes_rgb() -> None:
    left, right = left_and_right(encode(halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "JPEG", quality=95))
    assert np.allclose(left, (255, 0, 0), atol=6)
    assert np.allclose(right, (0, 0, 0), atol=6)


def test_alpha_is_laid_over_white() -> None:
    data = encode(halves("RGBA", (255, 0, 0, 0), (0, 0, 0, 128)), "PNG")
    assert left_and_right(data) == ((255, 255, 255), (127, 127, 127))


def test_transparent_palette_colour_becomes_white() -> None:
    image = halves("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert left_and_right(encode(image, "PNG", transparency=0)) == ((255, 255, 255), (0, 255, 0))


def test_grey_with_a_transparent_key_becomes_white_there() -> None:
    data = encode(halves("L", 10, 90), "PNG", transparency=10)
    assert left_and_right(data) == ((255, 255, 255), (90, 90, 90))


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    pixels = np.full((20, 40), 0x40FF, np.uint16)
    pixels[:, 20:] = 0xFF00
    assert left_and_right(encode(Image.fromarray(pixels), "PNG")) == ((64,) * 3, (255,) * 3)


def test_one_bit_becomes_black_and_white() -> None:
    assert left_and_right(encode(halves("1", 0, 1), "PNG")) == ((0, 0, 0), (255, 255, 255))


def test_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((4, 4)) == (255, 0, 0)


def test_multi_picture_jpeg_from_a_phone_is_read() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.allclose(decode(data).getpixel((4, 4)), (255, 0, 0), atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_to_pixels_and_to_the_size(orientation: int, kind: str) -> None:
    image = halves("RGB", (250, 250, 250), (5, 5, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif, quality=95)
    upright, size = decode(data), read_size(data)
    assert (size.width, size.height, size.orientation) == (*upright.size, orientation)
    assert upright.size == ((20, 40) if orientation >= 5 else (40, 20))
    bright = {
        1: (2, 10),
        2: (37, 10),
        3: (37, 10),
        4: (2, 10),
        5: (10, 2),
        6: (10, 2),
        7: (10, 37),
        8: (10, 37),
    }
    assert min(upright.getpixel(bright[orientation])) > 200


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    data = encode(halves("RGB", (255, 0, 0), (0, 0, 255)), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read_size(data).orientation == 1
    assert left_and_right(data) == ((255, 0, 0), (0, 0, 255))


def reason(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, limits)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_file_is_refused(kind: str) -> None:
    data = encode(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    assert reason(data[: len(data) * 2 // 3]) == "broken"


def test_what_is_no_image_is_refused() -> None:
    assert reason(b"") == "empty"
    assert reason(b"<html>404 not found</html>") == "unknown-format"
    assert reason(encode(Image.new("RGB", (8, 8)), "TIFF")) == "unknown-format"


def test_limits_are_checked_before_anything_is_decoded() -> None:
    data = bomb(41_000, 39_000)
    assert len(data) < 2_000
    with pytest.raises(BadImage, match="far over 64 MP") as caught:
        decode(data)
    assert caught.value.reason == "too-many-pixels"
    with pytest.raises(BadImage, match=r"image is 9,000 x 9,000 px; limit 64 MP"):
        read_size(bomb(9_000, 9_000))
    small = encode(Image.new("RGB", (8, 8)), "PNG")
    assert reason(small, Limits(max_bytes=10)) == "too-many-bytes"
    assert reason(small, Limits(min_pixels=65)) == "too-few-pixels"
    assert decode(small, Limits(min_pixels=64, max_pixels=64)).size == (8, 8)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims `width` x `height` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_bad_image_and_nothing_else(kind: str) -> None:
    rng = random.Random(7)
    whole = encode(Image.effect_noise((24, 24), 90).convert("RGB"), kind)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(6):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            outcomes.add(decode(bytes(data), Limits(max_pixels=10_000)).mode)
        except BadImage as error:
            outcomes.add(error.reason)
    assert outcomes <= {"RGB", "broken", "unknown-format", "too-many-pixels", "too-few-pixels"}


def test_bad_image_keeps_its_reason_through_a_process_boundary() -> None:
    copy = pickle.loads(pickle.dumps(BadImage("broken", "image does not decode")))
    assert (copy.reason, str(copy)) == ("broken", "image does not decode")


@pytest.mark.parametrize("name", ODD)
def test_every_odd_picture_has_its_defined_result(name: str) -> None:
    make, expected = ODD[name]
    data = make()
    if isinstance(expected, str):
        assert reason(data, LIMITS) == expected
    else:
        image, size = decode(data, LIMITS), read_size(data, LIMITS)
        assert (image.mode, image.size) == ("RGB", expected)
        assert (size.width, size.height) == expected


MEMORY = """
    import sys
    from pathlib import Path
    from llava.data.images import BadImage, Limits, decode, shrink

    def status(name):
        return int(next(line for line in Path("/proc/self/status").open() if line.startswith(name)).split()[1])

    limits = Limits(*map(int, sys.argv[2:]))
    files = sorted(Path(sys.argv[1]).iterdir())
    decode(files[0].read_bytes(), limits)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    for file in files:
        for function in (decode, lambda data, limits: shrink(data, 16, limits)):
            try:
                function(file.read_bytes(), limits)
            except BadImage:
                pass
    print(len(files), (status("VmHWM") - before) // 1024)
"""


def test_odd_pictures_cost_no_more_memory_than_the_limits_allow(tmp_path: Path) -> None:
    (tmp_path / "-first").write_bytes(encode(Image.new("RGB", (8, 8)), "JPEG"))
    for number, (make, _) in enumerate(ODD.values()):
        (tmp_path / f"{number}").write_bytes(make())

    def measured(max_pixels: int) -> tuple[int, int]:
        limits = [str(value) for value in (LIMITS.max_bytes, LIMITS.min_pixels, max_pixels)]
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), *limits]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        files, mebibytes = map(int, done.stdout.split())
        return files, mebibytes

    files, mebibytes = measured(LIMITS.max_pixels)
    print(f"{files} odd pictures decoded and shrunk: {mebibytes} MiB at the peak")
    assert files > len(ODD) >= 25
    assert mebibytes < 32
    assert measured(100_000_000)[1] > 100  # what the limit saves: one 81 MP picture of 2 kB


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_shrunk_picture_is_upright_and_has_the_wanted_short_side(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(halves("RGB", (250, 250, 250), (5, 5, 5)).resize((1200, 600)), kind, exif=exif)
    small, size = shrink(data, 100)
    image = Image.open(io.BytesIO(small))
    assert (image.format, image.size) == ("JPEG", (size.width, size.height))
    assert image.size == ((200, 100) if orientation == 1 else (100, 200))
    assert size.orientation == read_size(small).orientation == 1
    assert min(image.getpixel((20, 50))) > 200
    assert max(image.getpixel((180, 50) if orientation == 1 else (50, 180))) < 60


def test_shrinking_takes_the_same_bytes_each_time_and_refuses_what_decoding_refuses() -> None:
    data = encode(Image.effect_noise((400, 300), 90).convert("RGB"), "JPEG")
    assert shrink(data, 64) == shrink(data, 64)
    with pytest.raises(BadImage) as caught:
        shrink(data[:2000], 64)
    assert caught.value.reason == "broken"


def result_of(function: object, data: bytes, limits: Limits) -> object:
    try:
        return function(data, limits) is not None
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("name", ODD)
def test_what_is_proved_is_what_decodes_for_every_odd_picture(name: str) -> None:
    data = ODD[name][0]()
    assert result_of(prove, data, LIMITS) == result_of(decode, data, LIMITS)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_damaged_or_cut_jpeg_is_proved_exactly_where_it_decodes(
    mode: str, options: dict[str, object]
) -> None:
    rng = random.Random(11)
    whole = encode(Image.effect_noise((99, 70), 90).convert(mode), "JPEG", **options)
    limits, outcomes = Limits(max_pixels=100_000), set()
    for number in range(150):
        data = bytearray(whole)
        if number % 3:
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        if number % 2:
            del data[rng.randrange(len(data)) :]
        expected = result_of(decode, bytes(data), limits)
        assert result_of(prove, bytes(data), limits) == expected
        outcomes.add(expected)
    assert {True, "broken"} <= outcomes
    size = prove(whole, limits)
    assert (size.width, size.height) == (99, 70)
