"""JSON files of any size, one element after the other, each with the place of its bytes.

The file is a list, or an object whose values are lists (COCO): memory holds one element and one chunk. Off-the-shelf
streaming parsers do not tell where an element lies, and with that the tasks can read their own samples.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from components.contract.store import Store
from components.shard.sources.record_index import LONGEST
from llava.errors import RefusedInput

_CHUNK = 4 * 2**20
_BLANK = re.compile(r"[ \t\n\r]*")
_OF_NUMBERS = frozenset("0123456789.eE+-")
_decoder = json.JSONDecoder()


class Element(NamedTuple):
    """One element of a list: the list's key ("" where the file itself is the list), the value, its bytes' place."""

    key: str
    value: Any
    start: int
    size: int


def parse(data: bytes) -> Any:
    """The value of one element's bytes; ValueError. Bytes that are no UTF-8 become lone surrogates."""
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


class JsonStream:
    """Iterates over the elements of all lists; `lists` names those that were met so far."""

    def __init__(self, store: Store, key: str) -> None:
        self.lists: set[str] = set()
        self._place = f"{store.uri}/{key}"
        self._chunks = store.chunks(key, _CHUNK)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._byte, self._ended = "", 0, 0, False

    def __iter__(self) -> Iterator[Element]:
        try:
            self._more()
            if self._text.startswith("\ufeff"):
                self._skip(1)
            opening = self._peek()
            if opening == "[":
                yield from self._list("")
            elif opening == "{":
                yield from self._lists()
            else:
                self._value()
            if self._peek():
                raise self._error("more after the end")
        except FileNotFoundError:
            raise RefusedInput(f"{self._place} does not exist") from None

    def _lists(self) -> Iterator[Element]:
        self._skip(1)
        if self._peek() == "}":
            self._skip(1)
            return
        while True:
            if self._peek() != '"':
                raise self._error("a key expected")
            key = self._value()[0]
            if self._peek() != ":":
                raise self._error("':' expected")
            self._skip(1)
            if self._peek() == "[":
                yield from self._list(key)
            else:
                self._value()
            if self._after("}"):
                return

    def _list(self, key: str) -> Iterator[Element]:
        self.lists.add(key)
        self._skip(1)
        if self._peek() == "]":
            self._skip(1)
            return
        while True:
            self._peek()
            value, start, size = self._value()
            yield Element(key, value, start, size)
            if self._after("]"):
                return

    def _after(self, closing: str) -> bool:
        found = self._peek()
        if found not in (",", closing) or not found:
            raise self._error(f"',' or '{closing}' expected")
        self._skip(1)
        return found == closing

    def _value(self) -> tuple[Any, int, int]:
        while len(self._text) - self._at <= LONGEST:
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._error("nested too deeply") from None
            except ValueError as error:
                if not self._more():
                    told = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise self._error(told) from None
                continue
            length = end - self._at
            # A number at the end of what is read so far may go on.
            if (end < len(self._text) and self._text[end] not in _OF_NUMBERS) or not self._more():
                start = self._byte
                self._skip(length)
                return value, start, self._byte - start
        raise self._error(f"a value of more than {LONGEST:,} bytes, or a fault in it")

    def _peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None
            self._skip(blank.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _skip(self, characters: int) -> None:
        end = self._at + characters
        if self._text.isascii():
            self._byte += characters
        else:
            self._byte += len(self._text[self._at : end].encode("utf-8", "surrogateescape"))
        self._at = end

    def _more(self) -> bool:
        """Take in at least as much again as is pending; False at the end of the file."""
        parts, wanted = [self._text[self._at :]], max(1, len(self._text) - self._at)
        while wanted > 0 and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(self._utf8.decode(chunk or b"", final=self._ended))
            wanted -= len(parts[-1])
        before = len(parts[0])
        self._text, self._at = "".join(parts), 0
        return len(self._text) > before

    def _error(self, told: str) -> RefusedInput:
        return RefusedInput(f"{self._place} is not valid JSON: {told} near byte {self._byte:,}")
