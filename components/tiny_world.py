"""The tiny world: scenes of a few coloured shapes, with captions and boxes in COCO's terms.

A scene is a 64 x 64 px picture with one or two things on a grid of 2 x 2 places, one thing to a place.
Everything follows from `(seed, index)`, so the same scene can be drawn anywhere, at any time, in any order.
The split is a property of what is seen, not of the seed: a scene is held out when its combination, the set of
(colour, shape, place), hashes into the held-out share. No seed ever puts such a combination into training.
"""

import hashlib
import io
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from components.contract.printable import in_words

Box = tuple[float, float, float, float]

SIDE = 64
CELL = SIDE // 2
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (45, 165, 70),
    "blue": (50, 85, 215),
    "yellow": (235, 205, 45),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 12.0, "large": 22.0}
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNT_WEIGHTS = {1: 1, 2: 2}
KINDS = ("colour", "shape", "what", "where", "count", "exists")
"""The questions that the tiny language model learns to answer; comparisons take it far longer."""

HELD_OUT_SHARE = 0.125
TRAIN, HELD_OUT_SPLIT = "train", "heldout"

_ANTIALIAS = 4
_JITTER = 0.6
_COLOUR_SHIFT = 18
_SIZE_SHIFT = 1.5
_BACKGROUND = (205, 245)
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene; `cell` counts the grid in raster order."""

    cell: int
    size: str
    colour: str
    shape: str

    @property
    def category(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def phrase(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass
class Scene:
    """A drawn scene; boxes are COCO's: x, y, width, height in pixels, from the top left corner."""

    id: str
    png: bytes
    width: int
    height: int
    captions: list[str]
    objects: list[tuple[str, Box]]
    split: str


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the endless series that `seed` names."""
    rng = random.Random(f"shapes {seed} {index}")
    things = arrange(rng)
    told = captions(things, rng)
    where = boxes(things, rng)
    image = draw(things, where, rng)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return Scene(
        id=f"shapes-{seed}-{index:07d}",
        png=buffer.getvalue(),
        width=SIDE,
        height=SIDE,
        captions=told,
        objects=[(thing.category, box) for thing, box in zip(things, where, strict=True)],
        split=split_of(things),
    )


def scenes(seed: int, count: int, split: str | None = None) -> Iterator[Scene]:
    """The first `count` scenes of the series, or the first `count` of them that belong to `split`."""
    if split not in (None, TRAIN, HELD_OUT_SPLIT):
        raise ValueError(f"split {split!r}: must be {TRAIN!r}, {HELD_OUT_SPLIT!r} or None")
    wanted = (index for index in itertools.count() if split is None or _split_at(seed, index) == split)
    for index in itertools.islice(wanted, count):
        yield scene(seed, index)


def arrange(rng: random.Random) -> list[Thing]:
    """One or two things on places of their own, in raster order."""
    count = rng.choices(list(COUNT_WEIGHTS), weights=list(COUNT_WEIGHTS.values()))[0]
    return [
        Thing(cell, rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        for cell in sorted(rng.sample(range(len(PLACES)), count))
    ]


def split_of(things: Sequence[Thing]) -> str:
    """`heldout` or `train`, from the combination alone (colour, shape and place; size and jitter do not count)."""
    combination = ";".join(f"{t.cell} {t.colour} {t.shape}" for t in sorted(things))
    share = int.from_bytes(hashlib.sha256(combination.encode()).digest()[:8], "big") / 2**64
    return HELD_OUT_SPLIT if share < HELD_OUT_SHARE else TRAIN


def captions(things: Sequence[Thing], rng: random.Random) -> list[str]:
    """Four ways to tell the scene: place by place, as a sentence, in mixed order, and without the places."""
    mixed = rng.sample(list(things), len(things))
    at = {thing.cell: thing.phrase for thing in things}
    return [
        "; ".join(f"{name}: {at.get(cell, 'empty')}" for cell, name in enumerate(PLACES)),
        in_words([f"a {t.phrase} at the {PLACES[t.cell]}" for t in things]),
        f"the picture shows {in_words([f'a {t.phrase} in the {PLACES[t.cell]} corner' for t in mixed])}",
        f"{_NUMBERS[len(things)]} object{'s' * (len(things) > 1)}: {in_words([f'a {t.phrase}' for t in mixed])}",
    ]


def boxes(things: Sequence[Thing], rng: random.Random) -> list[Box]:
    """A box for each thing, inside its place; size and position vary a little, so that nothing repeats."""
    made = []
    for thing in things:
        width = SIZES[thing.size] + rng.uniform(-_SIZE_SHIFT, _SIZE_SHIFT)
        room = CELL - width - 2
        left = CELL * (thing.cell % 2) + 1 + room / 2 + rng.uniform(-0.5, 0.5) * room * _JITTER
        top = CELL * (thing.cell // 2) + 1 + room / 2 + rng.uniform(-0.5, 0.5) * room * _JITTER
        made.append((round(left, 2), round(top, 2), round(width, 2), round(width, 2)))
    return made


def draw(things: Sequence[Thing], where: Sequence[Box], rng: random.Random) -> Image.Image:
    """The picture, 64 x 64 px RGB; the shades of the background and of each thing vary a little."""
    image = Image.new("RGB", (SIDE * _ANTIALIAS, SIDE * _ANTIALIAS), _background(rng))
    pen = ImageDraw.Draw(image)
    for thing, (left, top, width, _) in zip(things, where, strict=True):
        fill = tuple(_near(channel, rng) for channel in COLOURS[thing.colour])
        _shape(pen, thing.shape, left * _ANTIALIAS, top * _ANTIALIAS, width * _ANTIALIAS, fill)
    return image.reduce(_ANTIALIAS)


def _shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, width: float, fill: tuple[int, ...]
) -> None:
    """Every shape touches all four sides of its box."""
    right, bottom = x + width, y + width
    if shape == "circle":
        pen.ellipse((x, y, right, bottom), fill=fill)
    elif shape == "square":
        pen.rectangle((x, y, right, bottom), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x + width / 2, y), (right, bottom), (x, bottom)], fill=fill)
    elif shape == "cross":
        arm = width / 3
        pen.rectangle((x + arm, y, right - arm, bottom), fill=fill)
        pen.rectangle((x, y + arm, right, bottom - arm), fill=fill)
    else:
        raise ValueError(f"shape {shape!r}: must be one of {', '.join(SHAPES)}")


def _split_at(seed: int, index: int) -> str:
    return split_of(arrange(random.Random(f"shapes {seed} {index}")))


def _background(rng: random.Random) -> tuple[int, int, int]:
    shade = rng.randint(*_BACKGROUND)
    red, green, blue = (min(255, shade + rng.randint(-6, 6)) for _ in range(3))
    return red, green, blue


def _near(channel: int, rng: random.Random) -> int:
    return min(255, max(0, channel + rng.randint(-_COLOUR_SHIFT, _COLOUR_SHIFT)))
