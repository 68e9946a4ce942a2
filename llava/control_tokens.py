"""A conversation in a chat template of somebody else: control tokens in what a user wrote stay text.

What the library does for `apply_chat_template(..., sanitize_control_tokens=True)` (transformers 5.21 and newer do it;
older ones have no such option), with the template rendered in its own process (`llava.rendering`). Such tokens are
put between two private characters before the template sees them, and encoded without added tokens afterwards.
"""

import re
from typing import Any

from llava.rendering import RenderingError, literals, render
from llava.text_tokenizer import any_of

_START, _END = "\U000f0000", "\U000f0001"


def encoded(tokenizer: Any, source: str, turn: dict[str, Any]) -> list[int]:
    """Ids of the conversation of one turn up to where the assistant begins to write. Raises `RenderingError`."""
    text = render(
        source, [_marked(turn, _control(tokenizer, source))], tokenizer.special_tokens_map, opened=True
    )
    # A lone mark, of a token that the template took apart, is dropped; the texts beside it do not join.
    marked = re.compile(f"{_START}({any_of(tokenizer.added_tokens_encoder)}){_END}|[{_START}{_END}]")
    first, *pieces = marked.split(text)
    ids: list[int] = tokenizer.encode(first, add_special_tokens=False)
    for number, piece in enumerate(pieces):
        if piece:
            ids += _text(tokenizer, piece) if number % 2 == 0 else _after(tokenizer, piece)
    return ids


def _control(tokenizer: Any, source: str) -> re.Pattern[str]:
    """Special tokens, those that the folder names, and those that the template writes itself."""
    named = getattr(tokenizer, "chat_control_tokens", None)
    written = literals(source) if named is None else ""
    return re.compile(
        any_of(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special
            or (token.content in named if named is not None else _is_written(token.content, written))
        )
    )


def _is_written(token: str, literal: str) -> bool:
    return token in literal and not token.isspace()


def _marked(value: Any, control: re.Pattern[str]) -> Any:
    """`value` with every string in it marked; marks that somebody wrote are dropped first."""
    if isinstance(value, str):
        return control.sub(rf"{_START}\g<0>{_END}", value.replace(_START, "").replace(_END, ""))
    if isinstance(value, dict):
        return {key: _marked(one, control) for key, one in value.items()}
    return [_marked(one, control) for one in value] if isinstance(value, list) else value


def _after(tokenizer: Any, piece: str) -> list[int]:
    """Ids of text that follows other text: sentencepiece writes a space before every text that it is given."""
    begin: list[int] = tokenizer.encode("\n", add_special_tokens=False)
    ids: list[int] = tokenizer.encode(f"\n{piece}", add_special_tokens=False)
    if ids[: len(begin)] == begin:
        return ids[len(begin) :]
    return list(tokenizer.encode(piece, add_special_tokens=False))


def _text(tokenizer: Any, token: str) -> list[int]:
    """Ids of a token's letters, none of them that token."""
    begin, ids = tokenizer.encode("\n", add_special_tokens=False), _plain(tokenizer, f"\n{token}")
    ids = ids[len(begin) :] if ids[: len(begin)] == begin else _plain(tokenizer, token)
    if tokenizer.convert_tokens_to_ids(token) in ids:
        raise RenderingError(f"{token!r} in a text cannot be written as text")
    return ids


def _plain(tokenizer: Any, text: str) -> list[int]:
    """What the backend makes of `text` without looking for added tokens."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = [text]
    if backend.pre_tokenizer is not None:
        splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for split in splits for token in backend.model.tokenize(split)]
