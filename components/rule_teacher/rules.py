"""The rules teacher: questions and answers from symbols alone, without a model.

It reads what LLaVA's teacher reads (captions, and objects with COCO boxes) and writes the same three types:
conversations, detailed descriptions and reasoning. It asks only what the boxes settle: a thing must be named by one
word that fits nothing else, sides and sizes must differ clearly, and crowds are left alone. `objects` is None
when nobody looked for objects (then the captions alone speak) and empty when there are none.
Every function is pure: the same arguments and the same state of `rng` give the same text.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from components.contract.printable import in_words
from components.rule_teacher.view import (
    CLEARLY_APART,
    CLEARLY_BIGGER,
    CROWD,
    Box,
    View,
    draw_pair,
    look,
    quarter,
    side_of,
)
from components.rule_teacher.words import (
    COCO_NAMES,
    COLOURS,
    DETAIL_REQUESTS,
    NUMBERS,
    PHRASINGS,
    plural,
    with_article,
)
from llava.data.samples import BRIEF_REQUESTS

__all__ = [
    "ASK",
    "BRIEF_REQUESTS",
    "DETAIL_REQUESTS",
    "Objects",
    "Turn",
    "conversation",
    "detail",
    "reasoning",
]

Objects = Sequence[tuple[str, Box]] | None


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str


def conversation(
    captions: Sequence[str],
    objects: Objects,
    width: int,
    height: int,
    rng: random.Random,
    turns: int,
    kinds: Collection[str] | None = None,
) -> list[Turn]:
    """Up to `turns` turns of `kinds` (None: all), of different kinds before a kind repeats; no question twice.

    Empty if nothing is sure.
    """
    if objects is None:
        return [_brief(captions, rng)] if captions else []
    view = look(captions, objects, width, height)
    makers = [make for kind, make in ASK.items() if kinds is None or kind in kinds]
    asked: dict[str, Turn] = {}
    for _ in range(turns):
        for make in rng.sample(makers, len(makers)):
            turn = make(view, rng)
            if len(asked) < turns and turn is not None:
                asked.setdefault(turn.question, turn)
    return list(asked.values())


def detail(
    captions: Sequence[str], objects: Objects, width: int, height: int, rng: random.Random
) -> Turn | None:
    """A longer description: a caption, what there is of each kind, and where single things stand."""
    if not captions or (objects is None and len(set(captions)) < 2):
        return None
    request = rng.choice(DETAIL_REQUESTS)
    if objects is None:
        return Turn("detail", request, " ".join(_sentence(c) for c in sorted(set(captions), key=len)[-2:]))
    view = look(captions, objects, width, height)
    parts = [_sentence(rng.choice(list(captions)))]
    counts = Counter(thing.category for thing in view.things)
    if counts and len(view.things) <= CROWD:
        amounts = [with_article(c) if n == 1 else f"{NUMBERS[n]} {plural(c)}" for c, n in counts.items()]
        verb = "is" if next(iter(counts.values())) == 1 else "are"
        parts.append(f"There {verb} {in_words(amounts)}.")
    for name, thing in view.names.items():
        if name == thing.category and (place := quarter(thing)):
            parts.append(f"The {name} is in the {place} part of the picture.")
    return Turn("detail", request, " ".join(parts))


def reasoning(
    captions: Sequence[str], objects: Objects, width: int, height: int, rng: random.Random
) -> Turn | None:
    """A question that takes two steps, with the steps in the answer; None where the boxes settle none."""
    del captions
    if not objects:
        return None
    view = look((), objects, width, height)
    makers = [_order_reasoning, _size_reasoning]
    for maker in rng.sample(makers, len(makers)):
        if (turn := maker(view, rng)) is not None:
            return turn
    return None


def _count(view: View, rng: random.Random) -> Turn | None:
    """How many of a noun; answers from none upwards are drawn evenly among those the picture offers."""
    if len(view.things) > CROWD:
        return None
    counts = Counter(thing.noun for thing in view.things)
    by_answer: dict[int, list[str]] = {}
    for noun in sorted(counts):
        by_answer.setdefault(counts[noun], []).append(noun)
    if absent := _absent_nouns(view):
        by_answer[0] = absent
    if view.described:
        by_answer.setdefault(len(view.things), []).append("object")
    amount = rng.choice(sorted(by_answer))
    noun = rng.choice(by_answer[amount])
    return _turn("count", rng, NUMBERS[amount], nouns=plural(noun))


def _where(view: View, rng: random.Random) -> Turn | None:
    placed = [(name, place) for name, thing in view.names.items() if (place := quarter(thing))]
    if not placed:
        return None
    name, place = rng.choice(placed)
    return _turn("where", rng, place, name=name)


def _exists(view: View, rng: random.Random) -> Turn | None:
    """As many yes as no."""
    if rng.random() < 0.5 and view.things:
        return _turn("exists", rng, "yes", a_name=with_article(rng.choice(view.things).category))
    if view.described:
        shown = {thing.category for thing in view.things}
        mixed = {f"{a.colour} {b.noun}" for a in view.things for b in view.things}
        mixed |= {f"{colour} {thing.noun}" for colour in COLOURS[:6] for thing in view.things}
        absent = sorted(mixed - shown)
    else:
        absent = _absent_nouns(view)
    return _turn("exists", rng, "no", a_name=with_article(rng.choice(absent))) if absent else None


def _colour(view: View, rng: random.Random) -> Turn | None:
    nouns = [name for name, thing in view.names.items() if name == thing.noun and thing.colour]
    if not nouns:
        return None
    noun = rng.choice(nouns)
    return _turn("colour", rng, view.names[noun].colour or "", name=noun)


def _shape(view: View, rng: random.Random) -> Turn | None:
    """What carries a colour that only one thing has, or what stands in a place that only one thing has."""
    if not view.described:
        return None
    colours = Counter(thing.colour for thing in view.things)
    single = [thing for thing in view.things if colours[thing.colour] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return _turn("shape", rng, thing.noun, colour=thing.colour)


def _what(view: View, rng: random.Random) -> Turn | None:
    if not view.described:
        return None
    places = Counter(quarter(thing) for thing in view.things)
    single = [
        thing for thing in view.things if quarter(thing) and places[quarter(thing)] == places[None] + 1 == 1
    ]
    if not single:
        return None
    thing = rng.choice(single)
    return _turn("what", rng, with_article(thing.category), place=quarter(thing))


def _size(view: View, rng: random.Random) -> Turn | None:
    pair = draw_pair(view, rng, lambda a, b: max(a.area, b.area) >= CLEARLY_BIGGER * min(a.area, b.area))
    if pair is None:
        return None
    (first, a), (second, b) = pair
    if rng.random() < 0.5:
        return _turn(
            "size", rng, first if a.area > b.area else second, word="bigger", first=first, second=second
        )
    return _turn(
        "size", rng, first if a.area < b.area else second, word="smaller", first=first, second=second
    )


def _relation(view: View, rng: random.Random) -> Turn | None:
    pair = draw_pair(view, rng, lambda a, b: side_of(a, b) is not None)
    if pair is None:
        return None
    (first, a), (second, b) = pair
    across, side = side_of(a, b) or ("", "")
    ways = "to the left or to the right of" if across == "x" else "above or below"
    return _turn("relation", rng, side, first=first, second=second, ways=ways)


ASK: dict[str, Callable[[View, random.Random], Turn | None]] = {
    "count": _count,
    "where": _where,
    "exists": _exists,
    "colour": _colour,
    "shape": _shape,
    "what": _what,
    "size": _size,
    "relation": _relation,
}


def _order_reasoning(view: View, rng: random.Random) -> Turn | None:
    pair = draw_pair(view, rng, lambda a, b: abs(a.x - b.x) >= 2 * CLEARLY_APART)
    if pair is None:
        return None
    (first, a), (second, b) = pair
    start, end = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    met = first if (a.x < b.x) == (start == "left") else second
    other = second if met == first else first
    return Turn(
        "reasoning",
        f"If you went through the picture from {start} to {end}, would you come to the {first} "
        f"or to the {second} first, and why?",
        f"You would come to the {met} first, because it is further to the {start} than the {other}.",
    )


def _size_reasoning(view: View, rng: random.Random) -> Turn | None:
    pair = draw_pair(view, rng, lambda a, b: max(a.area, b.area) >= CLEARLY_BIGGER * min(a.area, b.area))
    if pair is None:
        return None
    (first, a), (second, b) = pair
    covering, covered = (first, second) if a.area > b.area else (second, first)
    return Turn(
        "reasoning",
        f"Which takes up more room in the picture, the {first} or the {second}, and could the other cover it?",
        f"The {covering} takes up more room. The {covered} is much smaller, so it could not cover it.",
    )


def _absent_nouns(view: View) -> list[str]:
    """Names that might have been asked for and that nothing in the picture, or in what was said of it, bears."""
    said = " ".join([*view.captions, *(thing.category for thing in view.things)]).casefold()
    pool = ("circle", "square", "triangle", "cross") if view.described else COCO_NAMES
    return [name for name in pool if not any(re.search(rf"\b{w}", said) for w in {name, *name.split()})]


def _brief(captions: Sequence[str], rng: random.Random) -> Turn:
    return Turn("brief", rng.choice(BRIEF_REQUESTS), _sentence(rng.choice(list(captions))))


def _turn(kind: str, rng: random.Random, answer: str, **words: str | None) -> Turn:
    return Turn(kind, rng.choice(PHRASINGS[kind]).format(**words), _sentence(answer))


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
