"""Texts to token ids, piece by piece, for any fast tokenizer.

A piece is encoded by where it stands. At the beginning of a sample and after a special token it is what the
stock tokenizer makes of it there; after other text it gets no space in front, which sentencepiece
tokenizers otherwise write before every text. Markup may hold special tokens; text never does.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from llava.errors import BadSample, RefusedInput

IMAGE = "<image>"
_SHORT, _KNOWN = 120, 50_000
_BRACKETED = re.compile(r"<.*>|\[.*\]", re.DOTALL)
_DROP_SPACES = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer"}


class Position(Enum):
    """Where a piece stands."""

    BEGIN = 0
    AFTER_SPECIAL = 1
    INSIDE = 2


class TextTokenizer:
    """One tokenizer's ids for markup and for text.

    Special are the tokens that the tokenizer calls so and those that stand in brackets, such as `<|im_end|>`;
    other added tokens are words. Raises `RefusedInput` for a tokenizer without `<image>` or a fast backend.
    """

    def __init__(self, tokenizer: Any, begin: str | None = None):
        """`begin`: the begin token, where the tokenizer writes it before every text: the text after it stands first."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RefusedInput(
                f"tokenizer {type(tokenizer).__name__} has no fast backend: save it with a tokenizer.json"
            )
        self.tokenizer, self.begin = tokenizer, begin
        added = backend.get_added_tokens_decoder()
        images = [number for number, token in added.items() if token.content == IMAGE]
        if not images:
            raise RefusedInput(
                f"the tokenizer has no `{IMAGE}` token: start from a LLaVA folder, or make one with backbones"
            )
        self.image_id: int = images[0]
        special = {
            number: token.content
            for number, token in added.items()
            if token.special or _BRACKETED.fullmatch(token.content)
        }
        kept = {number: token for number, token in added.items() if number not in special}
        needed = {tokenizer.eos_token, tokenizer.bos_token, IMAGE}
        # Text that no token stands for is unknown; it may become the padding token, never the end token.
        unknown = tokenizer.unk_token
        harmless = unknown is not None and unknown not in needed
        self.special = frozenset(n for n, text in special.items() if not (harmless and text == unknown))
        self._any_special = re.compile(any_of(special.values()))
        normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
        first = _plain(backend, normalizer, pre_tokenizer, kept.values())
        inside = _plain(backend, _unprefixed(normalizer), _unprefixed(pre_tokenizer), kept.values())
        first_only = _holds(pre_tokenizer, "prepend_scheme", "first")
        self._at = {
            Position.BEGIN: first,
            Position.AFTER_SPECIAL: inside if first_only else first,
            Position.INSIDE: inside,
        }
        numbers = {first.token_to_id(token.content): number for number, token in kept.items()}
        self._renumbered = {new: old for new, old in numbers.items() if new != old}
        if any(backend.model.id_to_token(new) is not None for new in self._renumbered):
            raise RefusedInput("the tokenizer's vocabulary has gaps: number its tokens without any, from 0")
        # Markup and short phrases come again and again; a call of the tokenizer costs tens of microseconds.
        self._known: dict[tuple[str, bool, Position], tuple[int, ...]] = {}

    def position(self, before: list[int]) -> Position:
        """Where a piece stands that follows the ids `before`."""
        if not before or (self.begin is not None and before == [self.tokenizer.bos_token_id]):
            return Position.BEGIN
        return Position.AFTER_SPECIAL if before[-1] in self.special else Position.INSIDE

    def text(self, text: str, position: Position) -> tuple[int, ...]:
        """Ids of what somebody wrote: no special token, whatever it contains. Raises `BadSample`."""
        if not text:
            return ()
        found = self._known.get((text, True, position))
        if found is None:
            found = tuple(self._text(text, position))
            if len(text) <= _SHORT and len(self._known) < _KNOWN:
                self._known[text, True, position] = found
        return found

    def markup(self, text: str, position: Position) -> tuple[int, ...]:
        """Ids of the template's own text, in which special tokens are special."""
        if not text:
            return ()
        found = self._known.get((text, False, position))
        if found is None:
            found = self._known[text, False, position] = tuple(self._markup(text, position))
        return found

    def _text(self, text: str, position: Position) -> list[int]:
        try:
            ids, offsets = self._encoded(text, position)
        except Exception as error:  # the library raises bare exceptions
            reason = "the text is not valid Unicode" if isinstance(error, TypeError) else str(error)
            raise BadSample("not encodable", f"{reason}: {text[:40]!r}") from error
        if self.special.isdisjoint(ids):
            return ids
        # The vocabulary of the model itself holds some special token as a piece of text.
        return [
            new
            for number, (start, end) in zip(ids, offsets(), strict=True)
            for new in (self._letters(text[start:end]) if number in self.special else [number])
        ]

    def _letters(self, text: str) -> list[int]:
        """`text`, which would be a special token as a whole, letter by letter."""
        found = [number for letter in text for number in self._encoded(letter, Position.INSIDE)[0]]
        if not self.special.isdisjoint(found):
            raise BadSample("not encodable", f"{text[:40]!r} can only be written as a special token")
        return found

    def _markup(self, text: str, position: Position) -> list[int]:
        if position is Position.BEGIN:
            if self.begin is not None and text.startswith(self.begin):
                return [self.tokenizer.bos_token_id, *self._stock(text.removeprefix(self.begin))]
            return self._stock(text)
        if position is Position.AFTER_SPECIAL:
            return self._stock(IMAGE + text)[1:]
        match = self._any_special.search(text)
        head = text[: match.start()] if match else text
        return self._encoded(head, position)[0] + self._stock(text[len(head) :])

    def _encoded(
        self, text: str, position: Position
    ) -> tuple[list[int], Callable[[], list[tuple[int, int]]]]:
        """Ids with no special token looked for, and how to get the letters (start, end) of each."""
        encoding = self._at[position].encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._renumbered:
            ids = [self._renumbered.get(number, number) for number in ids]
        return ids, lambda: encoding.offsets

    def _stock(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        return ids


def any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of `texts`, the longest first; it never matches where there are none."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"


def _plain(backend: Any, normalizer: Any, pre_tokenizer: Any, kept: Iterable[Any]) -> Any:
    """`backend` with other steps before the model, which both share, and only `kept` of the added tokens."""
    plain = type(backend)(backend.model)
    for name, state in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        if state is not None:
            step = copy.copy(getattr(backend, name))
            step.__setstate__(json.dumps(state).encode())
            setattr(plain, name, step)
    plain.add_tokens(list(kept))
    return plain


def _state(step: Any) -> Any:
    """A normalizer or pre-tokenizer as the JSON of `tokenizer.json`."""
    return None if step is None else json.loads(step.__getstate__())


def _holds(state: Any, key: str, value: str) -> bool:
    """Whether a step, or one inside it, has that setting."""
    if isinstance(state, list):
        return any(_holds(one, key, value) for one in state)
    return isinstance(state, dict) and (
        state.get(key) == value or any(_holds(one, key, value) for one in state.values())
    )


def _unprefixed(state: Any) -> Any:
    """The same step for text that follows other text: it writes no space in front and strips none."""
    if state is None or state["type"] in ("Prepend", "Strip"):
        return None
    if state["type"] == "Sequence":
        key = "normalizers" if "normalizers" in state else "pretokenizers"
        steps, changed = state[key], []
        for number, step in enumerate(steps):
            # Once spaces are gone, a space in front of each word is the only sign that one was there.
            if step["type"] in _DROP_SPACES:
                changed += steps[number:]
                break
            changed.append(_unprefixed(step))
        return {**state, key: [step for step in changed if step is not None]}
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    return {**state, "add_prefix_space": False} if "add_prefix_space" in state else state
