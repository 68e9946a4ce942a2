"""Golden renderings with their masks, image slots, truncation, and what is refused."""

from itertools import groupby

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava.conversation import IGNORE, Encoder
from llava.errors import BadSample, RefusedInput
from llava.templates import NAMES
from tests.support.tokenizer_kinds import tokenizer_of


def byte_tokenizer(bos: str | None = None, without: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, so that decoding gives back every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = [
        text
        for text in ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>")
        if text not in without
    ]
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    end = None if "</s>" in without else "</s>" if bos else "<|im_end|>"
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token=bos, eos_token=end)


LLAMA, QWEN = byte_tokenizer("<s>"), byte_tokenizer()


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    return ([{"from": "system", "value": system}] if system is not None else []) + turns


def rendered(encoder: Encoder, turns: list[dict[str, str]], images: int = 1) -> str:
    """The whole sample as text, what is learned between `[[` and `]]`."""
    encoded = encoder.encode(turns, images)
    assert all(label in (IGNORE, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    text = ""
    for learned, pairs in groupby(
        zip(encoded.ids, encoded.labels, strict=True), lambda pair: pair[1] != IGNORE
    ):
        part = encoder.tokenizer.decode([token for token, _ in pairs])
        text += f"[[{part}]]" if learned else part
    return text


TWO_TURNS = talk("<image>\nWhat?", "A dog.", "Sure?", "Yes.")
GOLDEN = {
    "plain": (LLAMA, talk("<image>\nDescribe it.", "A dog."), "<s><image><image>[[A dog.\n]]"),
    "v1": (
        LLAMA,
        TWO_TURNS,
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image><image>\nWhat? ASSISTANT:[[ A dog.</s>]]"
        "USER: Sure? ASSISTANT:[[ Yes.</s>]]",
    ),
    "v0": (
        LLAMA,
        TWO_TURNS,
        "<s>A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.###Human: <image><image>\nWhat?###Assistant:"
        "[[ A dog.###]]Human: Sure?###Assistant:[[ Yes.###]]",
    ),
    "llama_2": (
        LLAMA,
        TWO_TURNS,
        "<s>[INST] <<SYS>>\nA chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.\n<</SYS>>\n\n<image><image>\nWhat? "
        "[/INST][[ A dog. </s>]]<s>[INST] Sure? [/INST][[ Yes. </s>]]",
    ),
    "llava_llama_2": (
        LLAMA,
        TWO_TURNS,
        "<s>[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
        "<</SYS>>\n\n<image><image>\nWhat? [/INST][[ A dog. </s>]]<s>[INST] Sure? [/INST][[ Yes. </s>]]",
    ),
    "mistral_instruct": (
        LLAMA,
        TWO_TURNS,
        "<s>[INST] <image><image>\nWhat? [/INST][[ A dog.</s>]][INST] Sure? [/INST][[ Yes.</s>]]",
    ),
    "chatml": (
        QWEN,
        TWO_TURNS,
        "<|im_start|>user\n<image><image>\nWhat?<|im_end|>\n<|im_start|>assistant\n[[A dog.<|im_end|>]]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[Yes.<|im_end|>]]",
    ),
    "tokenizer": (
        tokenizer_of("bytes"),
        TWO_TURNS,
        "Rules: Be kind.\n\n### Q\n<image><image>\nWhat?\n### A\n[[A dog.<|im_end|>]]\n"
        "### Q\nSure?\n### A\n[[Yes.<|im_end|>]]",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_written_and_masked_as_by_hand(name: str) -> None:
    tokenizer, turns, expected = GOLDEN[name]
    assert rendered(Encoder(tokenizer, name, image_tokens=2), turns) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v1", "<s>Be brief. USER: What? ASSISTANT:[[ No.</s>]]"),
        ("v0", "<s>Be brief.###Human: What?###Assistant:[[ No.###]]"),
        ("llama_2", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat? [/INST][[ No. </s>]]"),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\n[[No.<|im_end|>]]",
        ),
        ("tokenizer", "Rules: Be brief.\n\n### Q\nWhat?\n### A\n[[No.<|im_end|>]]"),
    ],
)
def test_a_system_text_of_the_conversation_stands_for_the_default(name: str, expected: str) -> None:
    encoder = Encoder(GOLDEN[name][0], name, image_tokens=2)
    assert rendered(encoder, talk("What?", "No.", system="Be brief."), images=0) == expected


@pytest.mark.parametrize("name", ["plain", "mistral_instruct"])
def test_a_system_text_that_has_no_place_is_refused(name: str) -> None:
    with pytest.raises(BadSample, match="no place for a system text"):
        Encoder(LLAMA, name, 1).encode(talk("a", "b", system="c"), 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_the_open_turn_is_the_beginning_of_the_answered_one_and_ends_without_a_space(name: str) -> None:
    encoder = Encoder(GOLDEN[name][0], name, 4)
    whole = encoder.encode(TWO_TURNS, 1)
    prompt = encoder.prompt(TWO_TURNS[:3], 1)
    assert whole.ids[: len(prompt)] == prompt
    assert whole.labels[len(prompt)] != IGNORE == whole.labels[len(prompt) - 1]
    assert not encoder.tokenizer.decode(prompt).endswith(" ")


def test_sentencepiece_tokens_after_an_end_follow_the_tokenizer_and_not_us() -> None:
    """A legacy tokenizer writes a space before every section, a newer one only before the first."""
    turns = talk("<image>\nIs it?", "No.", "Why?", "Yes.")
    for kind, after_end, after_image in (("legacy", "▁USER", "▁"), ("sentencepiece", "U", "<0x0A>")):
        tokenizer = tokenizer_of(kind)
        tokens = tokenizer.convert_ids_to_tokens(Encoder(tokenizer, "v1", 1).encode(turns, 1).ids)
        assert tokens[tokens.index("</s>") + 1].startswith(after_end)
        assert tokens[tokens.index("<image>") + 1] == after_image


def test_image_slots_are_the_first_literals_and_no_more_than_the_images() -> None:
    encoder = Encoder(QWEN, "chatml", 5)
    encoded = encoder.encode(talk("<image>\nIs <image> a word?", "Yes, <image>."), 1)
    assert encoded.ids.count(encoder.image_id) == 5
    assert "Is <image> a word?" in encoder.tokenizer.decode(encoded.ids)


@pytest.mark.parametrize(
    ("question", "images", "expected"),
    [
        ("<image>\nWhat?", 1, "*\nWhat?"),
        ("What?\n<image>", 1, "*\nWhat?"),
        ("<image>What?", 1, "*\nWhat?"),
        (" What? <image>\n", 1, "*\nWhat?"),
        ("<image>", 1, "*"),
        ("Is <image> red?", 1, "Is * red?"),
        ("<image>\n<image>\nWhich?", 2, "*\n*\nWhich?"),
        ("First <image>, then <image>", 2, "First *, then *"),
        ("What?\n<image>", 0, "What?\n<image>"),
    ],
)
def test_a_picture_at_an_edge_of_a_question_stands_first_on_its_line(
    question: str, images: int, expected: str
) -> None:
    encoder = Encoder(LLAMA, "mistral_instruct", 1)
    text = encoder.tokenizer.decode(encoder.prompt(talk(question), images))
    assert text == f"<s>[INST] {expected.replace('*', '<image>')} [/INST]"


def test_several_pictures_in_several_turns_keep_their_order_and_number() -> None:
    turns = talk("A <image> or <image>?", "No <image>.", "And\n<image>", "Yes.", "<image> <image>?", "No.")
    encoder = Encoder(QWEN, "chatml", 3)
    encoded = encoder.encode(turns, 4)
    text = encoder.tokenizer.decode(encoded.ids)
    slot = "<image>" * 3
    assert encoded.images == 4
    assert encoded.ids.count(encoder.image_id) == 12
    questions = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]
    assert questions == [f"A {slot} or {slot}?", f"{slot}\nAnd", f"{slot} <image>?"]


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([], 0, "no turns"),
        ([{"from": "gpt", "value": "Hello"}], 0, "roles"),
        ([{"from": "system", "value": "Hello"}], 0, "roles"),
        (talk("a", "b", "c"), 0, "roles"),
        (talk("a", "b")[:1] * 2, 0, "roles"),
        ([*talk("a", "b"), *talk("a", "b", system="c")], 0, "roles"),
        (talk("no slot", "b"), 1, "image slot missing"),
        (talk("not in an answer", "<image>"), 1, "image slot missing"),
        (talk("a", None), 0, "no text"),  # type: ignore[arg-type]
        (talk("a \ud83d b", "c"), 0, "not encodable"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_refused_by_reason(
    turns: list[dict[str, str]], images: int, reason: str
) -> None:
    with pytest.raises(BadSample) as caught:
        Encoder(QWEN, "chatml", 2).encode(turns, images)
    assert caught.value.reason == reason


def test_truncation_keeps_whole_images_and_something_to_learn() -> None:
    cut = Encoder(QWEN, "chatml", 4, max_length=60).encode(talk("<image>\nWhat?", "A dog. " * 20), 1)
    assert cut.truncated
    assert len(cut.ids) == len(cut.labels) == 60
    assert cut.supervised > 0
    fits = Encoder(QWEN, "chatml", 4).encode(talk("<image>\nWhat?", "A dog. " * 20), 1)
    assert (fits.ids[:60], fits.labels[:60], fits.truncated) == (cut.ids, cut.labels, False)


@pytest.mark.parametrize("length", range(30, 100, 7))
def test_a_cut_never_goes_through_an_image(length: int) -> None:
    turns = talk("<image>\nWhat?", "A dog.", "<image>\nAnd this?", "A cat. " * 9)
    encoder = Encoder(QWEN, "chatml", 20, max_length=length)
    whole = Encoder(QWEN, "chatml", 20).encode(turns, 2).ids
    last = max(position for position, token in enumerate(whole) if token == encoder.image_id)
    if length > last:
        assert encoder.encode(turns, 2).ids.count(encoder.image_id) == 40
    else:
        with pytest.raises(BadSample, match="part of an image") as caught:
            encoder.encode(turns, 2)
        assert caught.value.reason == "image does not fit"


def test_a_cut_that_leaves_nothing_to_learn_is_refused() -> None:
    with pytest.raises(BadSample, match="no supervised token"):
        Encoder(QWEN, "chatml", 4, max_length=24).encode(talk("<image>\nWhat?", "A dog."), 1)


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        (
            "v2",
            LLAMA,
            "template 'v2' is unknown; known: chatml, llama_2, llava_llama_2, mistral_instruct, plain, tokenizer, "
            "v0, v1",
        ),
        ("v1", byte_tokenizer("<s>", without=("<image>",)), "no `<image>` token"),
        ("v1", byte_tokenizer("<s>", without=("</s>",)), "template v1: the tokenizer lacks an end token"),
        (
            "chatml",
            tokenizer_of("legacy"),
            r"template chatml: the tokenizer lacks <\|im_start\|> as one special",
        ),
        ("tokenizer", LLAMA, "no chat template of its own; name one of chatml"),
        ("plain", tokenizer_of("words"), r"lacks a token for the end of an answer, '\\n'"),
    ],
)
def test_a_template_that_the_tokenizer_cannot_write_is_refused_in_one_line(
    name: str, tokenizer: PreTrainedTokenizerFast, message: str
) -> None:
    with pytest.raises(RefusedInput, match=message) as caught:
        Encoder(tokenizer, name, 1)
    assert "\n" not in str(caught.value)


def test_what_ends_an_answer_is_known_for_generation() -> None:
    ends = {name: Encoder(GOLDEN[name][0], name, 0) for name in NAMES}
    assert {name: encoder.stop for name, encoder in ends.items() if encoder.stop} == {
        "plain": "\n",
        "v0": "###",
    }
    end = LLAMA.convert_tokens_to_ids("<|im_end|>")
    assert Encoder(LLAMA, "chatml", 0).stop_ids == sorted([LLAMA.eos_token_id, end])
    assert ends["v1"].stop_ids == [LLAMA.eos_token_id]
