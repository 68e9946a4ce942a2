"""Conversations to token ids and labels, piece by piece, so that the mask is known by construction.

A template is a row of `TEMPLATES`. Markup comes from the table and may hold special tokens; text that a
user or a model wrote is encoded with special tokens switched off, so that it can never become a turn, an
end token or an image slot. An image slot is one of the first `n` literal `<image>` of the human turns,
where `n` is the number of images that the sample names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.errors import LlavaError, RefusedInput

IGNORE = -100
IMAGE = "<image>"
_SHORT, _KNOWN = 120, 50_000


@dataclass(frozen=True)
class Template:
    """How turns are written. `{bos}` and `{eos}` stand for the tokenizer's own tokens."""

    name: str
    start: str
    """Before the first turn: the begin token and the system text."""
    user: tuple[str, str]
    """Before and after the human's text."""
    answer: tuple[str, str]
    """Before the assistant's text (not supervised), and the end that the model learns to write."""
    after: str = ""
    """Between an answered turn and the next one; not supervised."""
    lead: str = ""
    """A space that belongs to the text after it (tokenizers join it to the word)."""
    caption_only: bool = False
    """Stage 1: image, caption, newline; the question is not used (llava.md, section 2)."""


_V1 = (
    "A chat between a curious {user} and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the {user}'s questions."
)

TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", "{bos}", ("", ""), ("", "\n"), caption_only=True),
        Template(
            "v1", "{bos}" + _V1.format(user="user") + " ", ("USER:", " "), ("ASSISTANT:", "{eos}"), lead=" "
        ),
        Template(
            "chatml",
            "",
            ("<|im_start|>user\n", "<|im_end|>\n"),
            ("<|im_start|>assistant\n", "<|im_end|>"),
            "\n",
        ),
    )
}


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
        return sum(label != IGNORE for label in self.labels[1:])


class BadSample(LlavaError):
    """A sample that cannot be trained on. `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Encoder:
    """Turns samples into ids for one tokenizer, one template and one number of tokens per image."""

    def __init__(self, tokenizer: Any, template: str, image_tokens: int, max_length: int | None = None):
        if template not in TEMPLATES:
            raise RefusedInput(f"template {template!r} is unknown; known: {', '.join(sorted(TEMPLATES))}")
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template]
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        # Markup and short phrases come again and again; a call of the tokenizer costs tens of microseconds.
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}
        # Sentencepiece tokenizers put a space before a text; inside a sample that space does not exist.
        self._joint = self._raw("\n") if self._raw("a") != self._raw("\na")[len(self._raw("\n")) :] else None

    def encode(self, turns: Sequence[dict[str, str]], images: int) -> Encoded:
        """`turns`: `{"from": "human" | "gpt", "value"}`, alternating, human first, gpt last.

        Raises `BadSample` for wrong roles, missing image slots, or nothing left to learn.
        """
        check_turns(turns)
        ids, labels = self._open(), []
        labels += [IGNORE] * len(ids)
        left = images
        for number, turn in enumerate(turns):
            if turn["from"] == "human":
                if number and not self.template.caption_only:
                    after = self._markup(self.template.after)
                    ids += after
                    labels += [IGNORE] * len(after)
                piece, left = self._question(turn["value"], left)
                ids += piece
                labels += [IGNORE] * len(piece)
            else:
                piece = self._answer_text(turn["value"]) + self._markup(self.template.answer[1])
                ids += piece
                labels += piece
        if left:
            raise BadSample(
                "image slot missing", f"{images} images but {images - left} `{IMAGE}` in the human turns"
            )
        return self._finished(ids, labels, images)

    def prompt(self, turns: Sequence[dict[str, str]], images: int) -> list[int]:
        """Ids that end where the assistant begins to write; the last turn is the human's."""
        ids, left = self._open(), images
        for number, turn in enumerate(turns):
            if turn["from"] == "human":
                piece, left = self._question(turn["value"], left)
                ids += (self._markup(self.template.after) if number else []) + piece
            else:
                ids += self._answer_text(turn["value"]) + self._markup(self.template.answer[1])
        if left:
            raise BadSample(
                "image slot missing", f"{images} images but {images - left} `{IMAGE}` in the human turns"
            )
        return ids

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

    def _open(self) -> list[int]:
        return self._markup(self.template.start)

    def _question(self, text: str, images_left: int) -> tuple[list[int], int]:
        """The human's turn up to where the answer begins, and how many images are still unplaced."""
        parts = text.split(IMAGE, images_left)
        slots = len(parts) - 1
        slot = [self.image_id] * self.image_tokens
        if self.template.caption_only:
            return slot * slots, images_left - slots
        ids = self._markup(self.template.user[0])
        for number, part in enumerate(parts):
            ids += (slot if number else []) + self._text((self.template.lead if number == 0 else "") + part)
        close, opening = self.template.user[1], self.template.answer[0]
        return ids + self._markup(close + opening), images_left - slots

    def _answer_text(self, text: str) -> list[int]:
        return self._text(self.template.lead + text)

    def _text(self, text: str) -> list[int]:
        """Plain text in the middle of a sample; no special token can come out of it."""
        if self._joint is None:
            return self._raw(text)
        return self._raw("\n" + text)[len(self._joint) :] if text else []

    def _raw(self, text: str) -> list[int]:
        return self._ids(text, plain=True) if text else []

    def _markup(self, text: str) -> list[int]:
        """Text of the table, in which special tokens are special."""
        if not text:
            return []
        begin, end = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        text = text.replace("{bos}", begin).replace("{eos}", end)
        return self._ids(text, plain=False) if text else []

    def _ids(self, text: str, plain: bool) -> list[int]:
        found = self._known.get((text, plain))
        if found is None:
            found = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain))
            if len(text) <= _SHORT and len(self._known) < _KNOWN:
                self._known[text, plain] = found
        return list(found)


def check_turns(turns: Sequence[dict[str, str]]) -> None:
    """Roles alternate, human first, gpt last; `BadSample` names the turn that does not fit."""
    if not turns:
        raise BadSample("no turns", "the conversation is empty")
    for number, turn in enumerate(turns):
        expected = "gpt" if number % 2 else "human"
        if turn["from"] != expected:
            raise BadSample("roles", f"turn {number + 1} is from {turn['from']!r}, expected {expected!r}")
    if len(turns) % 2:
        raise BadSample("roles", f"the last of {len(turns)} turns is the human's: nobody answers it")


def chat_template(name: str) -> str:
    """The same template as Jinja, for stock `processor.apply_chat_template` on a saved model."""
    template = TEMPLATES[name]
    if template.caption_only:
        template = TEMPLATES["chatml"]

    def literal(text: str) -> str:
        text = text.replace("{bos}", "' + (bos_token or '') + '").replace(
            "{eos}", "' + (eos_token or '') + '"
        )
        return "{{ '" + text.replace("\n", "\\n").replace("user's", "user\\'s") + "' }}" if text else ""

    content = (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    lead = literal(template.lead)
    return (
        literal(template.start)
        + "{% for message in messages %}{% if message['role'] == 'user' %}"
        + "{% if not loop.first %}"
        + literal(template.after)
        + "{% endif %}"
        + literal(template.user[0])
        + lead
        + content
        + literal(template.user[1])
        + "{% else %}"
        + literal(template.answer[0])
        + lead
        + content
        + literal(template.answer[1])
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + literal(template.answer[0])
        + "{% endif %}"
    )
