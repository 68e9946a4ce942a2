"""The same conversation through the saved Jinja and the stock processor; the tokenizer's own chat template."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor

from llava import generate
from llava import model as models
from llava.conversation import Encoder
from llava.errors import RefusedInput
from llava.templates import TEMPLATES, chat_template, derive
from tests.llava.test_conversation import LLAMA, QWEN, talk
from tests.llava.test_text_tokenizer import ENCODERS, SLOT
from tests.support.tiny_llava import tiny_llava
from tests.support.tokenizer_kinds import tokenizer_of

PICTURE = Image.new("RGB", (40, 30), "red")
PAIRS = sorted(set(ENCODERS) - {("words", "v0")})
"""`###` of v0 clings to words, so for a tokenizer of whole words pieces and a whole differ."""


def messages(*texts: str, system: str | None = None, pictures: int = 1) -> list[dict[str, Any]]:
    """What a user of the stock processor writes; the pictures belong to the first question."""
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    for number, text in enumerate(texts):
        parts = [{"type": "image", "image": PICTURE}] * (0 if number else pictures)
        role = "assistant" if number % 2 else "user"
        found.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
    return found


def texts_of(name: str) -> list[str]:
    """A plain conversation. An answer of `v0` ends in text, where pieces and a whole may differ: no answer there."""
    return ["What is it?"] if name in ("plain", "v0") else ["What is it?", "A dog.", "Are you sure?"]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_the_jinja_gives_the_stock_tokenizer_the_ids_of_the_prompt(kind: str, name: str) -> None:
    tokenizer, texts = tokenizer_of(kind), texts_of(name)
    stock = tokenizer.apply_chat_template(
        messages(*texts),
        chat_template=chat_template(name, tokenizer),
        tokenize=False,
        add_generation_prompt=True,
    )
    whole = tokenizer.encode(stock.replace("<image>", "<image>" * SLOT))
    turns = talk(*texts)
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    assert ENCODERS[kind, name].prompt(turns, 1) == whole


@pytest.mark.parametrize(
    ("kind", "name"), [pair for pair in PAIRS if pair[0] in ("bytes", "regex", "legacy", "words")]
)
def test_the_stock_processor_reads_pictures_and_text_as_training_does(kind: str, name: str) -> None:
    processor = processor_of(kind, name)
    turns = talk(*texts_of(name))
    turns[0]["value"] = "<image>\n<image>\n" + turns[0]["value"]
    stock = processor.apply_chat_template(
        messages(*texts_of(name), pictures=2), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert stock["input_ids"][0] == Encoder(tokenizer_of(kind), name, 16).prompt(turns, 2)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_both_ways_of_calling_the_processor_give_the_ids_of_training(kind: str, name: str) -> None:
    """Rendered and tokenized at once, or one after the other: one begin token, where there is any."""
    processor, said = processor_of(kind, name), messages(*texts_of(name))
    at_once = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=True)
    text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    turns = talk(*texts_of(name))
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    trained = Encoder(tokenizer_of(kind), name, 16).prompt(turns, 1)
    assert processor(text=text, images=PICTURE)["input_ids"][0] == trained
    assert at_once["input_ids"][0] == trained


@pytest.mark.parametrize("kind", ["regex", "sentencepiece", "legacy"])
@pytest.mark.parametrize("name", ["v1", "tokenizer"])
def test_a_folder_whose_template_writes_the_begin_token_is_asked_as_it_was_trained(
    kind: str, name: str
) -> None:
    """So did earlier versions."""
    processor, tokenizer = processor_of(kind, name), tokenizer_of(kind)
    processor.chat_template = chat_template(name, tokenizer, joined=True)
    (text,) = (
        processor.apply_chat_template([one], add_generation_prompt=True, tokenize=False)
        for one in messages("What is it?", pictures=0)
    )
    assert text.startswith(tokenizer.bos_token)
    assert generate.template_name(processor) == name
    assert generate.prompt(processor, "What is it?", None) == tokenizer.encode(text, add_special_tokens=False)


def processor_of(kind: str, name: str) -> Any:
    edge = {"height": 64, "width": 64}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=edge, do_center_crop=False),
        tokenizer=tokenizer_of(kind),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(name, tokenizer_of(kind)),
    )


@pytest.mark.parametrize("name", ["v1", "v0", "llama_2", "chatml", "tokenizer"])
def test_the_jinja_writes_a_system_message_as_the_encoder_does(name: str) -> None:
    tokenizer = tokenizer_of("bytes")
    stock = tokenizer.apply_chat_template(
        messages("Why?", system="Be brief.", pictures=0),
        chat_template=chat_template(name, tokenizer),
        tokenize=False,
        add_generation_prompt=True,
    )
    ours = ENCODERS["bytes", name].prompt(talk("Why?", system="Be brief."), 0)
    assert tokenizer.decode(ours) == stock


@pytest.mark.parametrize("name", ["plain", "mistral_instruct"])
def test_the_jinja_refuses_a_system_message_that_has_no_place(name: str) -> None:
    with pytest.raises(Exception, match="no place for a system message"):
        LLAMA.apply_chat_template(messages("Why?", system="Be brief."), chat_template=chat_template(name))


def with_jinja(jinja: str, tokenizer: Any = LLAMA) -> Any:
    """The tokenizer with another chat template of its own."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = jinja
    return own


HEADERS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set about = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set about = 'Today is ' + strftime_now('%d %B %Y') %}{% endif %}"
    "<H>system</H>{{ about }}<E>{% for m in messages %}<H>{{ m['role'] }}</H>{{ m['content'] | trim }}<E>{% endfor %}"
    "{% if add_generation_prompt %}<H>assistant</H>{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif m['role'] == 'user' %}[Q]{{ m['content'] }}[A]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
PARTS_ONLY = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Q: {% else %}A: {% endif %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% if m['role'] == 'user' %}{{ '\\n' }}{% else %}{{ eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_the_pieces_of_a_foreign_chat_template_are_read_off() -> None:
    found = derive(with_jinja(HEADERS))
    assert found.first == "<s><H>system</H>Today is 26 Jul 2024<E><H>user</H>"
    assert found.system == "<s><H>system</H>{system}<E><H>user</H>"
    assert (found.later, found.reply, found.end) == ("<H>user</H>", "<E><H>assistant</H>", "<E>")
    found = derive(with_jinja(NO_SYSTEM))
    assert (found.first, found.later, found.reply, found.end, found.system) == (
        "<s>[Q]",
        "[Q]",
        "[A]",
        "</s>",
        "",
    )
    found = derive(with_jinja(PARTS_ONLY))
    assert (found.first, found.later, found.reply, found.end) == ("<s>Q: ", "\nQ: ", "\nA: ", "</s>")


def test_a_begin_token_that_the_tokenizer_writes_itself_is_part_of_its_template() -> None:
    assert (
        derive(with_jinja("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")).first == ""
    )
    legacy = tokenizer_of("legacy")
    own = with_jinja(NO_SYSTEM.removeprefix("{{ bos_token }}"), legacy)
    assert derive(own).first == "{bos}[Q]"


def test_added_words_in_the_markup_keep_their_own_ids() -> None:
    """They get other numbers in the copy of the tokenizer that reads plain text."""
    own = with_jinja(NO_SYSTEM.replace("[A]", "    dachshund  A:"), tokenizer_of("regex"))
    turns, stock = talk("What is it?"), "<|begin|>[Q]What is it?    dachshund  A:"
    assert Encoder(own, "tokenizer", 1).prompt(turns, 0) == own.encode(stock, add_special_tokens=False)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_every_row_is_read_off_its_own_jinja(name: str) -> None:
    """So a saved model whose tokenizer brought its template gives the same pieces when it is loaded again."""
    tokenizer = QWEN if name == "chatml" else LLAMA
    found, row = derive(with_jinja(chat_template(name), tokenizer)), TEMPLATES[name]
    own = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token}
    for piece in ("first", "later", "reply", "end", "system"):
        expected = getattr(row, piece)
        for mark, token in own.items():
            expected = expected.replace(mark, token)
        assert getattr(found, piece) == expected


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (
            "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and loop.last %}<think></think>"
            "{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "written differently by its place",
        ),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
            "the same end after every answer",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}",
            "0 times instead of once",
        ),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: Well, {% endif %}",
            "the open turn is not the beginning",
        ),
        (
            "{% for m in messages %}{{ raise_exception('never') }}{% endfor %}",
            "rendering failed with 'never'",
        ),
        (
            "{% for m in messages %}{% if loop.index == 5 %}Again, {% endif %}{{ m['role'] }}: {{ m['content'] }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "three turns",
        ),
    ],
)
def test_a_chat_template_that_is_no_row_of_turns_is_refused_in_one_line(jinja: str, message: str) -> None:
    with pytest.raises(RefusedInput, match=message) as caught:
        derive(with_jinja(jinja))
    assert "\n" not in str(caught.value)


def test_a_saved_model_brings_its_tokenizers_template_along(tmp_path: Path) -> None:
    processor = processor_of("bytes", "tokenizer")
    before = Encoder(processor.tokenizer, "tokenizer", 2).encode(talk("<image>\nWhat?", "A dog."), 1)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert generate.template_name(loaded) == "tokenizer"
    assert Encoder(loaded.tokenizer, "tokenizer", 2).encode(talk("<image>\nWhat?", "A dog."), 1) == before


def test_a_model_is_saved_with_its_template_and_what_ends_its_answers(tmp_path: Path) -> None:
    model, processor = generate.load(tiny_llava(tmp_path / "chatml"))
    asked = processor.chat_template
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, wanted in (("plain", asked), ("v0", chat_template("v0"))):
        models.save(model, processor, tmp_path / name, name)
        again = models.load_processor(tmp_path / name)
        assert again.chat_template == wanted
        assert models.template_of(tmp_path / name) == name
        ends = json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"]
        assert ends == end


def test_an_answer_that_ends_in_text_is_cut_there_and_writing_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = generate.load(tiny_llava(tmp_path / "model"))
    processor.chat_template = chat_template("v0")
    (free,) = generate.answer(model, processor, ["What?"], [PICTURE], 24)
    stop = next(letter for letter in free[1:] if letter.isascii() and letter.isprintable())
    monkeypatch.setitem(TEMPLATES, "v0", replace(TEMPLATES["v0"], end=stop))
    processor.chat_template = chat_template("v0")
    written = []
    stock = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: written.append(stock(**given)) or written[-1])
    (cut,) = generate.answer(model, processor, ["What?"], [PICTURE], 24)
    assert cut == free.split(stop)[0].strip()
    assert processor.tokenizer.decode(written[0][0]).endswith(stop)
