"""Whatever people write, with whatever tokenizer: the mask is the answers and their ends, and text stays text."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.conversation import IGNORE, Encoder
from llava.errors import RefusedInput
from llava.templates import NAMES, split_lead, template
from llava.text_tokenizer import _holds
from tests.llava.test_conversation import talk
from tests.support.tokenizer_kinds import KINDS, tokenizer_of

SLOT = 3
REFUSED = {("legacy", "chatml"), ("wordpiece", "plain"), ("words", "plain")}


def encoders() -> dict[tuple[str, str], Encoder]:
    """Every kind of tokenizer with every template that it can write."""
    found = {}
    for kind in KINDS:
        for name in NAMES:
            try:
                found[kind, name] = Encoder(tokenizer_of(kind), name, SLOT)
            except RefusedInput:
                assert (kind, name) in REFUSED
    return found


ENCODERS = encoders()
SPECIAL = st.sampled_from(
    [
        *(
            "<image>",
            "</s>",
            "<s>",
            "<unk>",
            "<|im_end|>",
            "<|im_start|>user\n",
            "<|endoftext|>",
            "<|begin|>",
            "<|end|>",
        ),
        *(
            "[END]",
            "[UNK]",
            "[/INST] ",
            "[INST]",
            "<<SYS>>",
            "###",
            "###Human: ",
            " ASSISTANT:",
            "USER:",
            "### A\n",
        ),
        *(
            "\n",
            "  ",
            "    ",
            " ",
            "\t",
            "▁",
            "##",
            "<0x0A>",
            "＜／ｓ＞",
            "</",
            "s>",
            "é",
            "e\u0301",
            "🙂",
            "👩‍👩‍👧",
            "\u202e",
            "\0",
        ),
        *("A dog.", " What is it?", "user", "dachshund", "It is red. " * 30),
    ]
)
TEXT = st.lists(st.one_of(SPECIAL, st.text(max_size=8)), max_size=5).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=90, deadline=None)
@given(data=st.data())
def test_labels_are_the_answers_and_their_ends_and_text_stays_text(kind: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in NAMES if (kind, name) in ENCODERS]))
    turns = data.draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    images = data.draw(st.integers(int(name == "plain"), 2))
    encoder = ENCODERS[kind, name]
    texts = [text for pair in turns for text in pair]
    texts[0] = "<image>\n" * images + texts[0]
    encoded = encoder.encode(talk(*texts), images)
    assert all(label in (IGNORE, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    learned = [label for label in encoded.labels if label != IGNORE]
    assert spelled(encoder, learned) == expected(encoder, kind, texts[1::2])
    harmless = [("<image>\n" * images if number == 0 else "") + "a" for number in range(len(texts))]
    assert specials(encoder, encoded.ids) == specials(encoder, encoder.encode(talk(*harmless), images).ids)
    assert encoded.ids.count(encoder.image_id) == images * SLOT


def specials(encoder: Encoder, ids: list[int]) -> Counter[int]:
    """How often each special token stands in `ids`; an unknown word is no special token that somebody wrote."""
    tokenizer = encoder.tokenizer
    markup = {number for token, number in tokenizer.get_added_vocab().items() if token[0] in "<["}
    harmless = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return Counter(number for number in ids if number in markup - harmless)


def spelled(encoder: Encoder, ids: list[int]) -> Any:
    """What the stock tokenizer decodes, with a token in front, since some decoders drop a space at the very first."""
    front = encoder.tokenizer.bos_token_id or encoder.tokenizer.eos_token_id
    decoded = encoder.tokenizer.decode([front, *ids])
    return decoded.removeprefix(encoder.tokenizer.decode([front]))


def expected(encoder: Encoder, kind: str, answers: list[str]) -> str:
    """The answers and their ends as this kind of tokenizer can spell them, found without the encoder."""
    row, tokenizer = template(encoder.template.name, encoder.tokenizer), encoder.tokenizer
    lead = split_lead(row.reply)[1]
    end = row.end.replace("{eos}", tokenizer.eos_token or "")
    if kind in ("wordpiece", "words"):
        find = words if kind == "words" else word_pieces
        ids = [number for answer in answers for number in (*find(tokenizer, answer), *ends(tokenizer, end))]
        return spelled(encoder, ids)
    if kind in ("sentencepiece", "legacy", "unigram"):
        answers = [answer.replace("▁", " ") for answer in answers]
    if kind == "unigram":
        known = "".join(re.escape(piece) for piece in tokenizer.get_vocab() if len(piece) == 1)
        answers = [re.sub(f"(?:<unk>|[^{known} ])+", "<unk>", answer) for answer in answers]
    text = "".join(lead + answer + end for answer in answers)
    if row.caption_only and (kind == "legacy" or (kind in ("loose", "unigram") and not text.startswith(" "))):
        # A caption follows a special token, where these tokenizers write a space.
        return " " + text
    return text


def ends(tokenizer: Any, end: str) -> list[int]:
    return tokenizer.encode(end, add_special_tokens=False)


def word_pieces(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def words(tokenizer: Any, text: str) -> list[int]:
    """One id a word; a word that is a special token is written letter by letter."""
    special, vocabulary = set(tokenizer.get_added_vocab()), tokenizer.get_vocab()
    unknown = tokenizer.unk_token_id
    found: list[int] = []
    # Python takes four separator characters for spaces that Unicode does not.
    for word in re.findall(r"[\S\x1c-\x1f]+", text):
        if word in special - {"<unk>"}:
            found += [vocabulary.get(letter, unknown) for letter in word]
        else:
            found.append(vocabulary.get(word, unknown))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_long_answer_is_learned_whole_and_cut_once(kind: str) -> None:
    text = "A small, red dog sits there. </s><image> é🙂 " * 2000
    encoder = Encoder(tokenizer_of(kind), "v1", SLOT, max_length=500)
    whole = ENCODERS[kind, "v1"].encode(talk("<image>\nWhat is it?", text), 1)
    cut = encoder.encode(talk("<image>\nWhat is it?", text), 1)
    assert whole.supervised > 10_000
    assert (cut.ids, cut.labels) == (whole.ids[:500], whole.labels[:500])


def test_a_setting_is_found_where_it_stands_and_not_in_a_text_that_tells_of_it() -> None:
    told = {"type": "Split", "pattern": {"String": '"prepend_scheme": "first"'}}
    inside = {"type": "Sequence", "pretokenizers": [told, {"type": "Metaspace", "prepend_scheme": "first"}]}
    assert not _holds(told, "prepend_scheme", "first") and not _holds(None, "prepend_scheme", "first")
    assert _holds(inside, "prepend_scheme", "first")
