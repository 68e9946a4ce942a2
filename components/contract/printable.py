"""Text for people: what a terminal would obey is written out, an error is one line, things are an enumeration."""

from __future__ import annotations

import re
from collections.abc import Sequence

# C0 and C1 controls, DEL, marks that turn the direction of text around, and halves of surrogates, which are how
# Python carries bytes that are not UTF-8 and which no terminal can be sent.
_OBEYED = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_LINES = re.compile(f"[{_OBEYED}]")
_IN_TEXT = re.compile(f"(?![\n\t])[{_OBEYED}]")


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey as its escape; line ends and tabs stay."""
    return _IN_TEXT.sub(_escape, text)


def one_line(error: BaseException, longest: int = 300) -> str:
    """The first line of an error's text, cut; its type where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0][:longest] or type(error).__name__


def in_words(parts: Sequence[str]) -> str:
    """One or more things as an enumeration: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def has_controls(text: str) -> bool:
    """Whether `text` holds such a character, a line end or a tab."""
    return _IN_LINES.search(text) is not None


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")
