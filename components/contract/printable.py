"""Text from outside as it may reach a terminal: what a terminal would obey is written out, not obeyed."""

from __future__ import annotations

import re

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


def has_controls(text: str) -> bool:
    """Whether `text` holds such a character, a line end or a tab."""
    return _IN_LINES.search(text) is not None


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")
