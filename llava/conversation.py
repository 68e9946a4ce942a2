"""Conversations to token ids and labels, piece by piece, so that the mask is known by construction.

Markup comes from a template (llava/templates.py) and may hold special tokens; text that a user or a model
wrote is encoded so that it can never become a turn, an end token or an image slot (llava/text_tokenizer.py). An
image slot is one of the first `n` literal `<image>` of the human turns, where `n` is the number of images
that the sample names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from llava.errors import BadSample, RefusedInput
from llava.templates import SYSTEM, Template, adds_begin, split_lead, template
from llava.text_tokenizer import IMAGE, Position, TextTokenizer

IGNORE = -100


@dataclass(frozen=True)
class Encoded:
    """One sample as the model reads it: image slots are already `image_tokens` ids long each."""

    ids: list[int]
    labels: list[int]
    """As long as `ids`; `IGNORE` where nothing is learned."""
    images: int
    truncated: bool = False

    @property
    def supervised(self) -> int:
        """Tokens that carry loss: a label at position 0 has no position before it that predicts it."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE)


class Encoder:
    """Turns samples into ids for one tokenizer, one template and one number of tokens per image.

    Raises `RefusedInput` for an unknown template and for one that the tokenizer cannot write.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_name: str,
        image_tokens: int,
        max_length: int | None = None,
        joined: bool = False,
    ):
        """`joined`: the text after the begin token is encoded as following it, as earlier versions did."""
        row = template(template_name, tokenizer)
        self.tokenizer = tokenizer
        self.template = _with_tokens(row, tokenizer)
        self.image_tokens = image_tokens
        self.max_length = max_length
        begin = tokenizer.bos_token if adds_begin(tokenizer) and not joined else None
        self.pieces = TextTokenizer(tokenizer, begin)
        self.image_id = self.pieces.image_id
        self._slot = [self.image_id] * image_tokens
        self._check_markup()

    @property
    def stop(self) -> str | None:
        """Text that ends an answer, where no special token does."""
        last = self.pieces.markup(self.template.end, Position.INSIDE)[-1]
        return None if last in self.pieces.special else self.template.end

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's own end, and the one that this template writes."""
        last = self.pieces.markup(self.template.end, Position.INSIDE)[-1]
        ends = {self.tokenizer.eos_token_id, last if last in self.pieces.special else None}
        return sorted(end for end in ends if end is not None)

    def encode(self, turns: Sequence[dict[str, str]], images: int) -> Encoded:
        """`turns`: `{"from": "human" | "gpt", "value"}`, alternating, human first (or a system text), gpt last.

        Raises `BadSample` for wrong roles, missing image slots, an image that does not fit, or nothing left
        to learn.
        """
        check_turns(turns)
        ids, labels = self._write(turns, images)
        return self._finished(ids, labels, images)

    def prompt(self, turns: Sequence[dict[str, str]], images: int) -> list[int]:
        """Ids that end where the assistant begins to write; the last turn is the human's. Raises `BadSample`."""
        check_turns(turns, answered=False)
        return self._write(turns, images)[0]

    def _write(self, turns: Sequence[dict[str, str]], images: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        pieces, row = self.pieces, self.template

        def put(piece: Sequence[int], learned: bool = False) -> None:
            ids.extend(piece)
            labels.extend(piece if learned else [IGNORE] * len(piece))

        def markup(text: str) -> str:
            """Write it, but for the space that belongs to the text after it."""
            body, lead = split_lead(text)
            put(pieces.markup(body, pieces.position(ids)))
            return lead

        opening, left = row.first, images
        for turn in turns:
            if turn["from"] == "system":
                before, opening = self._around_system()
                put(pieces.text(markup(before) + turn["value"], pieces.position(ids)))
            elif turn["from"] == "human":
                text, lead = turn["value"], markup(opening)
                parts = _image_first(text, left).split(IMAGE, left)
                for number, part in enumerate(parts):
                    put(self._slot if number else ())
                    if not row.caption_only:
                        put(pieces.text((lead if number == 0 else "") + part, pieces.position(ids)))
                left -= len(parts) - 1
                lead, opening = markup(row.reply), row.later
            else:
                put(pieces.text(lead + turn["value"], pieces.position(ids)), learned=True)
                put(pieces.markup(row.end, pieces.position(ids)), learned=True)
        if left:
            raise BadSample(
                "image slot missing", f"{images} images but {images - left} `{IMAGE}` in the human turns"
            )
        return ids, labels

    def _around_system(self) -> tuple[str, str]:
        if SYSTEM not in self.template.system:
            raise BadSample("roles", f"template {self.template.name} has no place for a system text")
        before, after = self.template.system.split(SYSTEM)
        return before, after

    def _finished(self, ids: list[int], labels: list[int], images: int) -> Encoded:
        truncated = self.max_length is not None and len(ids) > self.max_length
        if truncated:
            kept = ids[: self.max_length]
            if kept.count(self.image_id) != images * self.image_tokens:
                raise BadSample(
                    "image does not fit",
                    f"{len(ids)} tokens; the cut at {self.max_length} would lose part of an image",
                )
            ids, labels = kept, labels[: self.max_length]
        encoded = Encoded(ids, labels, images, truncated)
        if not encoded.supervised:
            raise BadSample("nothing to learn", f"no supervised token in {len(ids)} tokens")
        return encoded

    def _check_markup(self) -> None:
        """Refuse a template that this tokenizer cannot write."""
        row, pieces, unknown = self.template, self.pieces, self.tokenizer.unk_token_id
        for token in row.tokens:
            if (
                len(pieces.markup(token, Position.BEGIN)) != 1
                or token not in self.tokenizer.get_added_vocab()
            ):
                raise RefusedInput(
                    self._lacks(f"{token} as one special token: add it, and train its embedding")
                )
        for text in row.markup:
            ids = pieces.markup(text, Position.INSIDE)
            if unknown in ids and self.tokenizer.unk_token not in text:
                raise RefusedInput(self._lacks(f"tokens for {text!r}: parts of it are unknown"))
        if not pieces.markup(row.end, Position.INSIDE):
            raise RefusedInput(self._lacks(f"a token for the end of an answer, {row.end!r}"))

    def _lacks(self, what: str) -> str:
        return f"template {self.template.name}: the tokenizer lacks {what}; or name another template"


def _with_tokens(row: Template, tokenizer: Any) -> Template:
    """The row with the tokenizer's own tokens for `{bos}` and `{eos}`."""
    if tokenizer.eos_token is None and any("{eos}" in text for text in row.markup):
        raise RefusedInput(
            f"template {row.name}: the tokenizer lacks an end token: set eos_token, or name another template"
        )
    own = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token or ""}

    def written(text: str) -> str:
        return reduce(lambda done, mark: done.replace(mark, own[mark]), own, text)

    return replace(
        row,
        first=written(row.first),
        later=written(row.later),
        reply=written(row.reply),
        end=written(row.end),
        system=written(row.system),
    )


def _image_first(text: str, slots: int) -> str:
    """A picture before or after the question is written before it, on a line of its own.

    So does the reference, for every picture; here one in the middle of a text, or one of several in a turn,
    stays where the text names it.
    """
    if not slots or text.count(IMAGE) != 1 or text.startswith(f"{IMAGE}\n"):
        return text
    before, after = (part.strip() for part in text.split(IMAGE))
    if before and after:
        return text
    return f"{IMAGE}\n{before}{after}" if before or after else IMAGE


def check_turns(turns: Sequence[dict[str, str]], answered: bool = True) -> None:
    """Roles alternate, human first (after an optional system text), gpt last, or the human where the last turn
    is not `answered`; every turn holds text. `BadSample` names the turn that does not fit.
    """
    if not turns:
        raise BadSample("no turns", "the conversation is empty")
    spoken = turns[turns[0]["from"] == "system" :]
    for number, turn in enumerate(spoken):
        expected = "gpt" if number % 2 else "human"
        if turn["from"] != expected:
            raise BadSample("roles", f"turn {number + 1} is from {turn['from']!r}, expected {expected!r}")
    for number, turn in enumerate(turns):
        if not isinstance(turn["value"], str):
            raise BadSample("no text", f"turn {number + 1} holds {turn['value']!r} instead of text")
    if bool(len(spoken) % 2) == answered or not spoken:
        raise BadSample(
            "roles",
            f"the last of {len(turns)} turns is the human's: nobody answers it"
            if answered
            else f"the last of {len(turns)} turns is not the human's",
        )
