"""Inputs that are nearly right, and what must hold whatever is done with them.

Hypothesis draws one number for each input, from the seed `LLAVA_FUZZ_SEED` or else a fixed one, and shows the number
where an input fails; from it come all changes. Drawing each change would cost more than reading the input.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from workflows import failures

SEED = int(os.environ.get("LLAVA_FUZZ_SEED", "13"))
SECONDS, MEMORY = 8.0, 300 * 2**20
"""Of the processor that one input may take; bytes that all inputs of a kind may add to the process."""
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e308, -1e308, math.nan, math.inf,
    -math.inf, "", " ", "a", "-1", "nan", "9" * 5000, "x" * 5000, "..", "../../x", "/etc/passwd", "a/b", "a\\b",
    "s3://x/y", "file:///etc/passwd", "-x", "\0", "\n", "\x1b[2J", "\ud800", "\u202e", "{{1}}", "%s%n", "@@DEEP@@",
    "@@LONG@@", [], {}, [[]], [None], [1] * 3, {"": None}, {"a": {}}, ["a", "a"], [{}],
]  # fmt: skip
_DEEP = "[" * 20_000 + "]" * 20_000
Make = Callable[[Random], Any]
"""Makes an input from a source of chance."""


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in list(items):
        yield value, key
        if isinstance(one, dict | list):
            yield from _spots(one)


def like_json(chance: Random, value: Any) -> bytes:
    """JSON like `value`: a few values replaced, gone, doubled or renamed; now and then the text itself is hurt."""
    whole = [copy.deepcopy(value)]
    for _ in range(chance.randint(1, 3)):
        spots = list(_spots(whole))
        inside, key = chance.choice(spots)
        match chance.choice(("replace", "replace", "replace", "drop", "other", "wrap", "rename")):
            case "replace":
                inside[key] = copy.deepcopy(chance.choice(NASTY))
            case "drop" if inside is not whole:
                del inside[key]
            case "other":
                there, name = chance.choice(spots)
                inside[key] = copy.deepcopy(there[name])
            case "wrap":
                inside[key] = [inside[key]]
            case "rename" if isinstance(inside, dict):
                inside[str(chance.choice(NASTY))] = inside.pop(key)
    text = json.dumps(whole[0]).replace('"@@DEEP@@"', _DEEP).replace('"@@LONG@@"', "9" * 5000)
    return _hurt(chance, text)


def _hurt(chance: Random, text: str) -> bytes:
    at = chance.randint(0, len(text))
    match chance.choice(("whole",) * 12 + ("cut", "mark", "UTF-16", "twice", "byte")):
        case "cut":
            return text[:at].encode()
        case "mark":
            return b"\xef\xbb\xbf" + text.encode()
        case "UTF-16":
            return text.encode("utf-16")
        case "twice":
            return (text + text).encode()
        case "byte":
            return text[:at].encode() + b"\xff" + text[at:].encode()
    return text.encode()


def like_lines(chance: Random, values: list[Any]) -> bytes:
    """JSON Lines of which one is changed."""
    lines = [json.dumps(value).encode() for value in values]
    at = chance.randrange(len(lines))
    lines[at] = like_json(chance, values[at])
    return b"\n".join(lines) + b"\n"


def like_bytes(chance: Random, data: bytes) -> bytes:
    """`data` with a few bytes changed, cut out, put in or repeated."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        near = chance.choice((len(found), 64, 512))
        at = chance.randint(0, min(len(found), near))
        at = at if chance.random() < 0.5 else len(found) - at
        size = chance.choice((1, 1, 1, 2, 4, 8, 64, 512))
        match chance.choice(("set", "set", "set", "cut", "put", "repeat", "end", "fill")):
            case "set":
                found[at : at + min(size, 8)] = chance.randbytes(min(size, 8))
            case "cut":
                del found[at : at + size]
            case "put":
                found[at:at] = chance.randbytes(min(size, 8))
            case "repeat":
                found[at:at] = found[at : at + size] * chance.randint(1, 20)
            case "end":
                del found[at:]
            case "fill":
                found[at : at + size] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF))]) * size
    return bytes(found)


class Held:
    """What an input did that it must not."""

    def __init__(self, place: Path) -> None:
        self.place = place
        """Where everything may be written."""
        self.inputs = 0
        self.seconds = 0.0

    def run(self, work: Callable[[], object]) -> None:
        """Read one input: it may end in one line that a command would say, and in nothing else."""
        began = time.process_time()
        try:
            with _watched(self.place):
                work()
        except Exception as error:
            cause = failures._cause(error)
            if failures._expected(cause) is None:
                raise
            assert "\n" not in failures._expected(cause)[0]  # type: ignore[index]
        took = time.process_time() - began
        assert took < SECONDS, f"{took:.1f} s"
        self.seconds += took


def fuzz(kind: str, make: Make, held: Held, work: Callable[[Any], object], *, seconds: float) -> None:
    """Try inputs for so many seconds, and say how many there were and with which seed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends, number = time.monotonic() + seconds, SEED
    how = settings(
        max_examples=500, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def once(chance: int) -> None:
        if time.monotonic() < ends or not held.inputs:
            held.inputs += 1
            work(make(Random(chance)))

    while time.monotonic() < ends:
        seed(number)(how(given(st.integers(0, 2**64 - 1))(once)))()
        number += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{kind}: {held.inputs:,} inputs, {held.seconds:.1f} s, {grown / 2**20:.0f} MiB, LLAVA_FUZZ_SEED={SEED}"
    )
    assert grown < MEMORY


_places: list[Path] = []
_outside: list[str] = []
_EVENTS = {"os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1,
           "os.truncate": 0, "os.chmod": 0}  # fmt: skip


def _hook(event: str, told: tuple[Any, ...]) -> None:
    if not _places:
        return
    if event == "open" and isinstance(told[2], int) and told[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = told[0]
    elif event in _EVENTS:
        path = told[_EVENTS[event]]
    elif event in ("os.system", "os.exec", "subprocess.Popen", "socket.connect"):
        _outside.append(f"{event} {told!r}"[:300])
        return
    else:
        return
    if isinstance(path, str | bytes | os.PathLike):
        whole = Path(os.fsdecode(path)).absolute()
        if (
            not whole.is_relative_to(_places[0])
            and whole != Path("/dev/null")
            and "__pycache__" not in whole.parts
        ):
            _outside.append(f"{event} {whole}")


sys.addaudithook(_hook)


@contextmanager
def _watched(place: Path) -> Iterator[None]:
    """Fail where something outside `place` is written, or a program or a connection is started."""
    _places.append(place)
    _outside.clear()
    try:
        yield
    finally:
        _places.pop()
    assert not _outside, _outside
