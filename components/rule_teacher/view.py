"""What the rules teacher makes of one picture's symbols: things, the names that fit only one, places and sides."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.rule_teacher.words import COLOURS

Box = tuple[float, float, float, float]

CROWD = 12
CLEAR_OF_MIDDLE = 0.08
CLEARLY_BIGGER = 2.0
CLEARLY_APART = 0.15


@dataclass(frozen=True)
class Thing:
    """One object; lengths are shares of the picture's sides, the centre is (x, y) from the top left."""

    category: str
    colour: str | None
    noun: str
    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height


@dataclass(frozen=True)
class View:
    """What the teacher knows about one picture."""

    captions: tuple[str, ...]
    things: tuple[Thing, ...]
    names: dict[str, Thing]

    @property
    def described(self) -> bool:
        """Whether every object carries a colour, as in a full description; lists of mere categories never are."""
        return bool(self.things) and all(thing.colour for thing in self.things)


def look(captions: Sequence[str], objects: Sequence[tuple[str, Box]], width: int, height: int) -> View:
    """Every object as a thing, and under each name the only thing that bears it (no names at all in a crowd)."""
    things = tuple(_thing(category, box, width, height) for category, box in objects)
    uses = Counter(name for thing in things for name in {thing.category, thing.noun})
    names = {name: thing for thing in things for name in (thing.category, thing.noun) if uses[name] == 1}
    return View(tuple(captions), things, names if len(things) <= CROWD else {})


def _thing(category: str, box: Box, width: int, height: int) -> Thing:
    colour, _, noun = category.partition(" ")
    if colour not in COLOURS or not noun:
        colour, noun = "", category
    x, y, w, h = box
    return Thing(
        category, colour or None, noun, (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
    )


def quarter(thing: Thing) -> str | None:
    """The quarter that holds the thing's centre; None near a middle line or for a thing that fills the picture."""
    if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) < CLEAR_OF_MIDDLE or max(thing.width, thing.height) > 0.5:
        return None
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def side_of(a: Thing, b: Thing) -> tuple[str, str] | None:
    """(axis, side of `a` seen from `b`) where the centres differ clearly along one axis and little along the other."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= CLEARLY_APART and abs(dx) >= 1.5 * abs(dy):
        return "x", "left" if dx < 0 else "right"
    if abs(dy) >= CLEARLY_APART and abs(dy) >= 1.5 * abs(dx):
        return "y", "above" if dy < 0 else "below"
    return None


def draw_pair(
    view: View, rng: random.Random, fits: Callable[[Thing, Thing], bool]
) -> tuple[tuple[str, Thing], tuple[str, Thing]] | None:
    """Two things of different names, in a drawn order, or None if no two fit."""
    named = [(name, thing) for name, thing in view.names.items() if name == thing.category]
    pairs = [(p, q) for p in named for q in named if p[0] != q[0] and fits(p[1], q[1])]
    return rng.choice(pairs) if pairs else None
