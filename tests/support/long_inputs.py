"""Texts that make a careless regular expression slow, derived from the expression itself."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LENGTH = 40_000
_TAILS = ("", "\0")
_COMMON = (
    "\n",
    " ",
    "a",
    "0",
    ".",
    "-",
    "=",
    "<",
    "*",
    "a ",
    "a.",
    "\n ",
    " \n",
    "0.",
    "a\n",
    "'",
    "'a",
    "@",
    "/",
    "\t=",
)
_CATEGORIES = {
    codes.CATEGORY_DIGIT: "1",
    codes.CATEGORY_NOT_DIGIT: "a",
    codes.CATEGORY_SPACE: " ",
    codes.CATEGORY_NOT_SPACE: "a",
    codes.CATEGORY_WORD: "a",
    codes.CATEGORY_NOT_WORD: "*",
}
_PLAIN: dict[Any, Callable[[Any], str]] = {
    codes.LITERAL: chr,
    codes.RANGE: lambda ends: chr(ends[0]),
    codes.CATEGORY: lambda category: _CATEGORIES[category],
    codes.NOT_LITERAL: lambda _: "a",
    codes.ANY: lambda _: "a",
}
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


class TooSlow(Exception):
    """An expression took longer than it may."""


def texts(pattern: re.Pattern[str]) -> Iterator[str]:
    """Each begins as a match does, goes on with one part of the expression over and over, and ends otherwise."""
    seeds = dict.fromkeys(("", *_COMMON))
    for before, body in _pumps(parser.parse(pattern.pattern, pattern.flags), ""):
        seeds |= dict.fromkeys((body, before + body, before))
        yield before + _long(body) + "\0"
    for seed in filter(None, seeds):
        for tail in _TAILS if len(seed) == 1 else ("\0",):
            yield _long(seed) + tail


def within(seconds: float, work: Callable[[], object]) -> None:
    """Run `work`; `TooSlow` after so many seconds of processor time."""

    def late(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _long(text: str) -> str:
    return text * (LENGTH // max(1, len(text)))


def _pumps(items: Any, before: str) -> Iterator[tuple[str, str]]:
    """(what comes before, what is repeated) for every repetition in a parsed expression."""
    for code, value in items:
        for inner in _inner(code, value):
            yield from _pumps(inner, before)
            if code in _REPEATS:
                for body in dict.fromkeys((_sample(inner), *_members(inner))):
                    if body:
                        yield before, body
        before += _sample([(code, value)])


def _inner(code: Any, value: Any) -> list[Any]:
    if code in _REPEATS:
        return [value[2]]
    if code is codes.SUBPATTERN:
        return [value[3]]
    if code is codes.BRANCH:
        return list(value[1])
    return [value] if code is codes.ATOMIC_GROUP else []


def _members(items: Any) -> list[str]:
    """A letter for each thing that a set of letters holds, and each two of them."""
    found = []
    for code, value in items:
        if code is codes.IN and value[0][0] is not codes.NEGATE:
            letters = [_sample([one]) for one in value]
            found += [*letters, *(one + other for one in letters for other in letters if one != other)]
            found.append("".join(letters))
    return found


def _sample(items: Any) -> str:
    """A short text that the parsed expression matches, but for its looks around."""
    return "".join(_letter(code, value) for code, value in items)


def _letter(code: Any, value: Any) -> str:
    if code in _PLAIN:
        return _PLAIN[code](value)
    if code is codes.IN:
        return _of_set(value)
    if code in _REPEATS:
        return _sample(value[2]) * min(max(1, value[0]), 100)
    inner = _inner(code, value)
    return _sample(inner[0]) if inner else ""


def _of_set(value: Any) -> str:
    if value[0][0] is not codes.NEGATE:
        return _sample(value[:1])
    kept = re.compile("[^" + "".join(re.escape(_sample([one])) for one in value[1:]) + "]")
    return next(letter for letter in "a1 *\n" if kept.match(letter))
