"""YAML from anybody, within bounds: a config is small, flat, and ends."""

from pathlib import Path
from typing import Any

import yaml

from llava.errors import RefusedInput, from_the_system

BYTES, DEEPEST, NODES = 256 << 10, 32, 20_000
"""What a config may be: its size, how deep its sections lie, how many values it has once aliases are written out."""


class NoYaml(RefusedInput):
    """A text that is no YAML."""


def read(path: Path) -> Any:
    """The values of a YAML file. Raises `RefusedInput` for one that is no config whatever it holds."""
    try:
        with path.open("rb") as file:
            data = file.read(BYTES + 1)
    except OSError as error:
        if from_the_system(error):
            raise
        raise RefusedInput(f"{path}: {error.strerror}") from None
    if len(data) > BYTES:
        raise RefusedInput(f"{path}: more than {BYTES >> 10} KiB, too much for a config")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RefusedInput(f"{path}: not UTF-8 (byte {error.start:,}): save it as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> Any:
    """The values of a YAML text. Raises `NoYaml`, or `RefusedInput` past a bound; the line begins with `where`."""
    try:
        _check(text)
        return yaml.safe_load(text)
    except _Refused as error:
        raise RefusedInput(f"{where}: {error}") from None
    # PyYAML lets through what int(), float() and dates say of a value.
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise NoYaml(f"{where}: no YAML: {' '.join(str(error).split())[:300]}") from None


class _Refused(Exception):
    """Why a text is not read at all."""


def _check(text: str) -> None:
    """Walk over the text's events, which takes no recursion, before anything is built of them."""
    total = 0
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise _Refused(f"line {line}: *{event.anchor} is inside itself")
            total += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = total - before
        if len(open_) > DEEPEST:
            raise _Refused(f"line {line}: sections more than {DEEPEST} deep")
        if total > NODES:
            raise _Refused(f"more than {NODES:,} values, with aliases written out; too much for a config")
