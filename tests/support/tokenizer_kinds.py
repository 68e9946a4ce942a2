"""Small real tokenizers of every kind that language models come with, for tests that must hold for any.

| kind | model | what is special about it |
|---|---|---|
| bytes | byte-level BPE | no begin token; the end is `<|im_end|>`, which is also the padding |
| regex | byte-level BPE behind a split like Llama 3's | a begin token of its own; spaces and a word as added tokens |
| loose | byte-level BPE with a space before each text | turns not marked special; begin = end = padding = unknown |
| sentencepiece | BPE, Metaspace at the first word, byte fallback | padding = unknown |
| legacy | the same with a space before every section | padding = unknown, no turn tokens |
| unigram | Unigram with unknown letters | the vocabulary holds `<s>`, `</s>` and `<image>` as pieces of text |
| wordpiece | WordPiece, lower case | loses case, spaces and line ends |
| words | one id a word | the vocabulary holds `</s>` as a word |
"""

import functools
import json
import string

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llava.templates import TEMPLATES

TURNS = ["<|im_start|>", "<|im_end|>"]
_MARKUP = [piece for row in TEMPLATES.values() for piece in row.markup]
_TEXT = [
    *_MARKUP,
    "What is it? Sure? Are you sure? It is a dog. A dog. A small, red dog sits there.\n\nYes. No. Why?",
    "one two three four  five,   six; (seven) eight!\n\tnine -- ten",
]
_SPLIT = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"
FOREIGN = (
    "{{ bos_token or '' }}{% if messages[0].role == 'system' %}Rules: {{ messages[0].content }}\n\n"
    "{% set messages = messages[1:] %}{% else %}Rules: Be kind.\n\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}### Q\n{{ message.content | trim }}\n"
    "{% else %}### A\n{{ message.content | trim }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### A\n{% endif %}"
)
"""The chat template that every kind brings itself: of no row's shape."""
_OTHER_WORDS = "### Q A Rules: Be kind. system user assistant"
_LETTERS = string.ascii_letters + string.digits + string.punctuation + "\n▁"


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One tokenizer of each kind; tests must not change it."""
    tokenizer = _MAKERS[kind]()
    tokenizer.chat_template = FOREIGN
    return tokenizer


def _finished(raw: Tokenizer, added: list[str], **own: str | None) -> PreTrainedTokenizerFast:
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **own)


def _byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        _TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return raw


def _begin_first(raw: Tokenizer, begin: str) -> None:
    raw.add_special_tokens([AddedToken(begin, special=True, normalized=False)])
    token = (begin, raw.token_to_id(begin))
    raw.post_processor = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A {begin} $B", [token])


def _bytes() -> PreTrainedTokenizerFast:
    raw = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    return _finished(raw, [*TURNS, "<image>"], eos_token="<|im_end|>", pad_token="<|im_end|>")


def _regex() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    raw = _byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )
    _begin_first(raw, "<|begin|>")
    raw.add_tokens([AddedToken(text, normalized=False) for text in ["  ", "    ", "dachshund"]])
    return _finished(raw, ["<|end|>", *TURNS, "<image>"], bos_token="<|begin|>", eos_token="<|end|>")


def _loose() -> PreTrainedTokenizerFast:
    raw = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    raw.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    raw.add_tokens([AddedToken(text, normalized=False) for text in TURNS])
    end = "<|endoftext|>"
    return _finished(raw, ["<image>"], bos_token=end, eos_token=end, unk_token=end, pad_token=end)


def _sentencepiece_bpe() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [line for text in _TEXT for line in text.split("\n")]
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for word, _ in sorted(found["vocab"].items(), key=lambda item: item[1])]
    vocab = {piece: number for number, piece in enumerate([*pieces, *words])}
    merges = [tuple(merge) for merge in found["merges"]]
    raw = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(strip)
    _begin_first(raw, "<s>")
    return raw


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def _sentencepiece() -> PreTrainedTokenizerFast:
    raw = _sentencepiece_bpe()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _finished(raw, ["<unk>", "</s>", *TURNS, "<image>"], **_LLAMA)


def _legacy() -> PreTrainedTokenizerFast:
    raw = _sentencepiece_bpe()
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finished(raw, ["<unk>", "</s>", "<image>"], **_LLAMA)


def _unigram() -> PreTrainedTokenizerFast:
    specials = ["<unk>", "<s>", "</s>", "<image>", *TURNS]
    words = {f"▁{word}" for text in _TEXT for word in text.split()} - set(_LETTERS)
    scored = [(piece, 0.0) for piece in specials]
    scored += [(letter, -6.0) for letter in _LETTERS] + [(word, -8.0) for word in sorted(words)]
    raw = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    return _finished(raw, specials, **_LLAMA)


def _wordpiece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=False)
    alphabet = list(string.ascii_lowercase + string.digits + string.punctuation)
    raw.train_from_iterator(
        _TEXT,
        trainers.WordPieceTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["[UNK]"], show_progress=False
        ),
    )
    return _finished(
        raw, ["[END]", *TURNS, "<image>"], unk_token="[UNK]", eos_token="[END]", pad_token="[UNK]"
    )


def _words() -> PreTrainedTokenizerFast:
    known = {word for text in [*_TEXT, _OTHER_WORDS] for word in text.split()}
    words = ["<unk>", "</s>", "<image>", *TURNS, *sorted(known - {"<unk>", "</s>", *TURNS})]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(
        raw, ["<unk>", "</s>", "<image>", *TURNS], unk_token="<unk>", eos_token="</s>", pad_token="<unk>"
    )


_MAKERS = {
    "bytes": _bytes,
    "regex": _regex,
    "loose": _loose,
    "sentencepiece": _sentencepiece,
    "legacy": _legacy,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "words": _words,
}
KINDS = tuple(_MAKERS)
