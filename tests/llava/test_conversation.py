"""Ids and labels: the mask is what the assistant wrote, and nothing that a user writes becomes markup."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava.conversation import IGNORE, TEMPLATES, BadSample, Encoder, chat_template
from llava.errors import RefusedInput


def byte_tokenizer(bos: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that decoding gives back every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    end = "</s>" if bos else "<|im_end|>"
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token=bos, eos_token=end)


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {"chatml": byte_tokenizer(), "v1": byte_tokenizer("<s>")}
ENDS = {"chatml": "<|im_end|>", "v1": "</s>"}


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]


def rendered(encoder: Encoder, *texts: str, images: int = 1) -> tuple[str, str]:
    """The whole sample, and what is supervised of it, as text."""
    encoded = encoder.encode(talk(*texts), images)
    kept = [label for label in encoded.labels if label != IGNORE]
    return encoder.tokenizer.decode(encoded.ids), encoder.tokenizer.decode(kept)


def test_v1_is_written_as_the_reference_renders_it() -> None:
    whole, learned = rendered(Encoder(TOKENIZERS["v1"], "v1", 2), "<image>\nWhat?", "A dog.", "Sure?", "Yes.")
    assert whole == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image><image>\nWhat? ASSISTANT: A dog.</s>"
        "USER: Sure? ASSISTANT: Yes.</s>"
    )
    assert learned == " A dog.</s> Yes.</s>"


def test_chatml_is_written_turn_by_turn() -> None:
    whole, learned = rendered(
        Encoder(TOKENIZERS["chatml"], "chatml", 1), "<image>\nWhat?", "A dog.", "Sure?", "Yes."
    )
    assert whole == (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert learned == "A dog.<|im_end|>Yes.<|im_end|>"


def test_plain_is_image_caption_newline_without_the_question() -> None:
    whole, learned = rendered(Encoder(TOKENIZERS["v1"], "plain", 3), "<image>\nDescribe it.", "A dog.")
    assert whole == "<s><image><image><image>A dog.\n"
    assert learned == "A dog.\n"


def test_the_prompt_is_the_beginning_of_the_sample() -> None:
    for name in ("chatml", "v1"):
        encoder = Encoder(TOKENIZERS[name], name, 4)
        whole = encoder.encode(talk("<image>\nWhat?", "A dog."), 1)
        prompt = encoder.prompt(talk("<image>\nWhat?"), 1)
        assert whole.ids[: len(prompt)] == prompt
        assert all(label == IGNORE for label in whole.labels[: len(prompt)])


@pytest.mark.parametrize("name", ["chatml", "v1"])
def test_stock_chat_template_renders_the_same_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    stock = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(name), tokenize=False, add_generation_prompt=True
    )
    ours = Encoder(tokenizer, name, 1).prompt(talk("<image>\nWhat?", "A dog.", "Sure?"), 1)
    assert tokenizer.decode(ours) == stock


SPECIAL = st.sampled_from(
    [
        "<image>",
        "</s>",
        "<s>",
        "<|im_end|>",
        "<|im_start|>",
        " ASSISTANT:",
        "USER:",
        "[/INST] ",
        "\n",
        "",
        "é🙂",
        "###",
    ]
)
TEXT = st.lists(st.one_of(SPECIAL, st.text(max_size=8)), max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), name=st.sampled_from(["chatml", "v1"]))
def test_labels_are_the_answers_and_their_ends_whatever_is_written(
    turns: list[tuple[str, str]], name: str
) -> None:
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    encoder = Encoder(tokenizer, name, 3)
    texts = [text for pair in turns for text in pair]
    encoded = encoder.encode(talk(*texts), images=0)
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    expected: list[int] = []
    for answer in texts[1::2]:
        expected += [*plain_bytes(tokenizer, template.lead + answer), end]
    assert [label for label in encoded.labels if label != IGNORE] == expected
    assert encoder.image_id not in encoded.ids


def plain_bytes(tokenizer: Any, text: str) -> list[int]:
    """Every byte's token, with no special token looked for: the answer that the encoder must give."""
    split: Callable[[str], list[tuple[str, Any]]] = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    ).pre_tokenize_str
    return [tokenizer.convert_tokens_to_ids(letter) for piece, _ in split(text) for letter in piece]


def test_image_slots_are_the_first_literals_and_no_more_than_the_images() -> None:
    encoder = Encoder(TOKENIZERS["chatml"], "chatml", 5)
    encoded = encoder.encode(talk("<image>\nIs <image> a word?", "Yes, <image>."), 1)
    assert encoded.ids.count(encoder.image_id) == 5


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([], 0, "no turns"),
        ([{"from": "gpt", "value": "Hello"}], 0, "roles"),
        (talk("a", "b", "c"), 0, "roles"),
        (talk("a", "b")[:1] * 2, 0, "roles"),
        (talk("no slot", "b"), 1, "image slot missing"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_refused_by_reason(
    turns: list[dict[str, str]], images: int, reason: str
) -> None:
    with pytest.raises(BadSample) as caught:
        Encoder(TOKENIZERS["chatml"], "chatml", 2).encode(turns, images)
    assert caught.value.reason == reason


def test_truncation_keeps_whole_images_and_something_to_learn() -> None:
    tokenizer = TOKENIZERS["chatml"]
    cut = Encoder(tokenizer, "chatml", 4, max_length=60).encode(talk("<image>\nWhat?", "A dog. " * 20), 1)
    assert cut.truncated
    assert len(cut.ids) == len(cut.labels) == 60
    assert cut.supervised > 0
    with pytest.raises(BadSample, match="part of an image"):
        Encoder(tokenizer, "chatml", 80, max_length=60).encode(talk("<image>\nWhat?", "A dog."), 1)
    with pytest.raises(BadSample, match="no supervised token"):
        Encoder(tokenizer, "chatml", 4, max_length=24).encode(talk("<image>\nWhat?", "A dog."), 1)


def test_an_unknown_template_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(RefusedInput, match="chatml, plain, v1"):
        Encoder(TOKENIZERS["v1"], "v2", 1)
