"""JSON Lines: one value a line, UTF-8. A text may hold characters at which `str.splitlines` would cut (U+2028).

Half a surrogate pair, which JSON can carry and UTF-8 cannot, is written as a question mark.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def to_jsonl(values: Iterable[Any]) -> bytes:
    """One JSON value a line."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode(errors="replace")


def from_json(data: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, however deep it is nested."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_jsonl(data: bytes) -> list[Any]:
    """What `to_jsonl` wrote; empty lines are passed over. Raises ValueError that names the line."""
    values = []
    for number, line in enumerate(data.decode().split("\n"), start=1):
        if line.strip():
            try:
                values.append(from_json(line))
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {getattr(error, 'msg', error)}") from None
    return values
