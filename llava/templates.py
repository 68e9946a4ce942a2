"""How conversations are written: a table of templates, and the tokenizer's own chat template as one more row.

A row is the markup between the texts, as it is rendered. `{bos}` and `{eos}` stand for the tokenizer's own
tokens (`{bos}` for nothing where it has none), `{system}` for the system text of the conversation. A space
at the end of a piece belongs to the text after it: tokenizers join it to the word, and an open turn, where
the model is to write, ends without it.
"""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.errors import RefusedInput
from llava.rendering import RenderingError, render
from llava.text_tokenizer import IMAGE, any_of

OWN = "tokenizer"
"""The name that stands for the tokenizer's own chat template."""
SYSTEM = "{system}"


@dataclass(frozen=True)
class Template:
    """The markup around the texts of a conversation."""

    name: str
    first: str
    """Before the first question: the begin token, the default system text, the human's name."""
    later: str
    """Before every later question; after the end of an answer."""
    reply: str
    """Between a question and its answer; not supervised."""
    end: str
    """After an answer; the model learns to write it."""
    system: str = ""
    """Instead of `first` where a conversation brings its own system text; empty: it has no place."""
    tokens: tuple[str, ...] = ()
    """Markup that the tokenizer must know as one token each."""
    caption_only: bool = False
    """Stage 1: image, caption, newline; the question is not used."""

    @property
    def markup(self) -> tuple[str, ...]:
        """Every piece of markup, for whoever has to check it."""
        return (self.first, self.later, self.reply, self.end, *self.system.split(SYSTEM))


_ABOUT = (
    "A chat between a curious {person} and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the {person}'s questions."
)
_SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""Of the authors' `llava_llama_2`; `llama_2` with v1's text stays what checkpoints were trained with."""
_V1, _V0 = _ABOUT.format(person="user"), _ABOUT.format(person="human")


def _row(name: str, system: str, default: str, later: str, reply: str, end: str) -> Template:
    return Template(name, system.replace(SYSTEM, default), later, reply, end, system)


TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", "{bos}", "", "", "\n", caption_only=True),
        _row("v1", "{bos}{system} USER: ", _V1, "USER: ", " ASSISTANT: ", "{eos}"),
        _row("v0", "{bos}{system}###Human: ", _V0, "Human: ", "###Assistant: ", "###"),
        _row(
            "llama_2",
            "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            _V1,
            "{bos}[INST] ",
            " [/INST] ",
            " {eos}",
        ),
        _row(
            "llava_llama_2",
            "{bos}[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            _SEES,
            "{bos}[INST] ",
            " [/INST] ",
            " {eos}",
        ),
        Template("mistral_instruct", "{bos}[INST] ", "[INST] ", " [/INST] ", "{eos}"),
        Template(
            "chatml",
            "{bos}<|im_start|>user\n",
            "\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
            "{bos}<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
            ("<|im_start|>", "<|im_end|>"),
        ),
    )
}
"""Rendered forms: v1, table 2, and the authors' code; checked by hand in tests/llava/test_conversation.py."""

NAMES = (*TEMPLATES, OWN)
"""Every name that a config may give."""


def check_name(name: str) -> None:
    """Raises `RefusedInput` with the known names; whether a tokenizer fits is seen when it is at hand."""
    if name not in NAMES:
        raise RefusedInput(f"template {name!r} is unknown; known: {', '.join(sorted(NAMES))}")


def is_chat(name: str) -> bool:
    """Whether questions are written; a template of captions alone has none."""
    return name == OWN or not TEMPLATES[name].caption_only


def template(name: str, tokenizer: Any = None) -> Template:
    """The row `name`, or what `tokenizer` brings itself. Raises `RefusedInput` for an unknown name."""
    check_name(name)
    return derive(tokenizer) if name == OWN else TEMPLATES[name]


def split_lead(markup: str) -> tuple[str, str]:
    """The markup without the space at its end, and that space, which belongs to the text after it."""
    return (markup[:-1], " ") if markup.endswith(" ") else (markup, "")


def chat_template(name: str, tokenizer: Any = None, joined: bool = False) -> str:
    """The same template as Jinja, for stock `processor.apply_chat_template` on a saved model.

    The begin token is left to a tokenizer that writes one itself, as in llava-hf's templates: `processor(text=...)`
    of the rendered text would give two. `joined`: with it all the same, as folders made by earlier versions have it.
    """
    row = template(name, tokenizer)
    if not joined and adds_begin(tokenizer):
        row = _without_begin(row, tokenizer)
    answer = question = _content("{{ message['content'] }}", f"{IMAGE}\n", "{{ part['text'] }}")
    if row.caption_only:
        question = _content("{{ '<image>' * message['content'].count('<image>') }}", IMAGE, "")
    if SYSTEM in row.system:
        before, after = row.system.split(SYSTEM)
        system = _literal(before) + answer + _literal(after)
    else:
        system = "{{ raise_exception('this chat template has no place for a system message') }}"
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% if not loop.first %}"
        "{{ raise_exception('a system message must come first') }}{% endif %}"
        + system
        + "{% elif message['role'] == 'user' %}"
        "{% if loop.first %}"
        + _literal(row.first)
        + "{% elif messages[loop.index0 - 1]['role'] != 'system' %}"
        f"{_literal(row.later)}{{% endif %}}{question}"
        "{% else %}" + _literal(row.reply) + answer + _literal(row.end) + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + _literal(split_lead(row.reply)[0]) + "{% endif %}"
    )


def adds_begin(tokenizer: Any) -> bool:
    """Whether the tokenizer writes the begin token before a text by itself."""
    begin = None if tokenizer is None else tokenizer.bos_token_id
    return begin is not None and bool(tokenizer.encode("")[:1] == [begin])


def _without_begin(row: Template, tokenizer: Any) -> Template:
    def bare(text: str) -> str:
        for begin in ("{bos}", tokenizer.bos_token):
            if text.startswith(begin):
                return text.removeprefix(begin)
        return text

    return replace(row, first=bare(row.first), system=bare(row.system))


def _content(text: str, image: str, words: str) -> str:
    """A message's content: `text` where it is a string, else `image` or `words` for each of its parts."""
    return (
        "{% if message['content'] is string %}" + text + "{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + _literal(image)
        + "{% else %}"
        + words
        + "{% endif %}{% endfor %}{% endif %}"
    )


def _literal(text: str) -> str:
    """A Jinja expression that writes `text`."""
    if not text:
        return ""
    for plain, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        text = text.replace(plain, escaped)
    for token in ("bos", "eos"):
        text = text.replace(f"{{{token}}}", f"' + ({token}_token or '') + '")
    return "{{ '" + text + "' }}"


_SENTINELS = ("qfirstq", "afirsta", "qsecondq", "asecondq")
_SYSTEM_SENTINEL = "ssystems"
_NO_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_PROBE = ("What is it?", "A dog.\nA small one.", "Why?", "It barks!", "And now, then?", "It sleeps.")


def derive(tokenizer: Any) -> Template:
    """The tokenizer's own chat template, split into the pieces of a `Template`.

    Its Jinja is rendered with marked texts, the markup between them is read off, and the pieces must render a
    conversation of three turns as the Jinja does. Today is always 26 Jul 2024, so that ids are the same on every
    day. Raises `RefusedInput` where the Jinja cannot be split, as when it writes a turn differently
    by its place (one that drops earlier reasoning).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RefusedInput(
            f"template {OWN!r}: the tokenizer has no chat template of its own; "
            f"name one of {', '.join(sorted(TEMPLATES))}"
        )
    try:
        return _derive(_Jinja(tokenizer), tokenizer)
    except _NotSplit as reason:
        raise RefusedInput(
            f"template {OWN!r}: the tokenizer's own chat template cannot be split into turns: {reason}; "
            f"name one of {', '.join(sorted(TEMPLATES))}"
        ) from reason


class _NotSplit(Exception):
    """Why a chat template is not of the shape of a `Template`."""


class _Jinja:
    """The tokenizer's chat template as a function of texts."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.listed = tokenizer, False
        self.source = _NO_DATE + tokenizer.get_chat_template()
        # Some templates read a content as text, some as a list of parts.
        if _SENTINELS[0] not in self.render(_SENTINELS[:1]):
            self.listed = True

    def render(self, texts: Sequence[str], system: str | None = None, opened: bool = False) -> str:
        said = [("system", system)] if system is not None else []
        said += [("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.listed else text}
            for role, text in said
        ]
        try:
            return render(self.source, messages, self.tokenizer.special_tokens_map, opened)
        except RenderingError as error:
            raise _NotSplit(str(error)) from error

    def cut(self, texts: Sequence[str], system: str | None = None) -> list[str]:
        """The markup around `system`, where there is one, and `texts`; one piece more than these."""
        rest, pieces = self.render(texts, system), []
        for text in (*([system] if system is not None else []), *texts):
            if rest.count(text) != 1:
                raise _NotSplit(f"a text is written {rest.count(text)} times instead of once")
            before, rest = rest.split(text)
            pieces.append(before)
        return [*pieces, rest]


def _derive(jinja: _Jinja, tokenizer: Any) -> Template:
    first, reply, between, again, tail = jinja.cut(_SENTINELS)
    if jinja.cut(_SENTINELS[:2]) != [first, reply, tail] or reply != again:
        raise _NotSplit("the same turn is written differently by its place in the conversation")
    end = _end(tokenizer, between, tail)
    bos = tokenizer.bos_token
    begin = "{bos}" if adds_begin(tokenizer) and not first.startswith(bos) else ""
    row = Template(
        OWN,
        begin + first,
        between[len(end) :],
        reply,
        end,
        _system(jinja, [reply, between, again, tail], begin),
    )
    opened = jinja.render(_SENTINELS[:1], opened=True)
    if split_lead(opened)[0] != first + _SENTINELS[0] + split_lead(reply)[0]:
        raise _NotSplit("the open turn is not the beginning of an answered one")
    question, answer, *rest = _PROBE
    written = first + question + reply + answer + end
    for number, text in enumerate(rest):
        written += reply + text + end if number % 2 else row.later + text
    if written + tail[len(end) :] != jinja.render(_PROBE):
        raise _NotSplit("the pieces do not render a conversation of three turns as the template does")
    return row


def _end(tokenizer: Any, between: str, tail: str) -> str:
    """What ends every answer: up to the last special token that both the last and an earlier one end with."""
    common = os.path.commonprefix([between, tail])
    added = [token for token in tokenizer.get_added_vocab() if token.strip()]
    found = [match.end() for match in re.finditer(any_of(added), common)]
    if found:
        return common[: found[-1]]
    if not tail or common != tail:
        raise _NotSplit("it does not write the same end after every answer")
    return tail


def _system(jinja: _Jinja, others: list[str], begin: str) -> str:
    """How a system message opens a conversation; empty where the template has no place for one."""
    try:
        before, after, *rest = jinja.cut(_SENTINELS, _SYSTEM_SENTINEL)
    except _NotSplit:
        return ""
    return begin + before + SYSTEM + after if rest == others else ""
