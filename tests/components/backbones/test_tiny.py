import itertools
import json
import random

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from components import tiny_world
from components.backbones import language, shipped, tiny, vision
from components.backbones.tokenizer import train_tokenizer

FILE_LIMIT = 512 * 1024
ALL_LIMIT = 4_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped.TOWERS / shipped.LANGUAGE, local_files_only=True)


def test_the_record_tells_what_the_shipped_towers_can_do():
    """Other held-out scenes than the recorded ones: figures differ by chance, not by more."""
    torch.manual_seed(0)
    recorded = json.loads((shipped.TOWERS / shipped.RECORD).read_text())
    gates = tiny.measure(shipped.TOWERS, seed=7, scenes=120)
    for name in shipped.GATED:
        assert gates[name] == pytest.approx(recorded["gates"][name], abs=6), name
        if "patches" in name:
            assert min(gates[name], recorded["gates"][name]) >= tiny.GATE
    assert recorded["command"] and recorded["versions"] and recorded["output"]


def test_shipped_files_are_small():
    sizes = {path.name: path.stat().st_size for path in shipped.TOWERS.rglob("*") if path.is_file()}
    assert {name: size for name, size in sizes.items() if size >= FILE_LIMIT} == {}
    assert sum(sizes.values()) <= ALL_LIMIT


@pytest.mark.parametrize(
    "text", ["Straße, 東京, 🦙!", "  two  spaces\n\ttab ", "What colour is the circle?", ""]
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_word_of_a_text_picture_is_one_token(tokenizer):
    words = {word for text in (*vision.PHRASES, *tiny_world.PLACES) for word in text.split()}
    assert {
        word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1
    } == set()


def test_the_chat_template_and_the_training_text_agree(tokenizer):
    asked = language.Sample("a large red circle", (("What is it?", "A circle."), ("Where?", "Top left.")))
    messages = [
        {"role": "user", "content": "a large red circle\nWhat is it?"},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Top left."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "".join(text for text, _ in language.pieces(asked))
    assert tokenizer.eos_token == "<|im_end|>"


def test_only_answers_and_what_ends_them_are_learnt(tokenizer):
    given = language.batch(tokenizer, [language.Sample("empty", (("Is it?", "No."), ("Are you?", "Yes.")))])
    learnt = given.labels_BL[0]
    assert tokenizer.decode(learnt[learnt != language.IGNORED]) == "No.<|im_end|>Yes.<|im_end|>"


def test_text_pictures_tell_a_place_to_each_of_its_patches():
    things = [tiny_world.Thing(3, "large", "red", "circle")]
    drawn = [language.text_picture(things, random.Random(seed)) for seed in range(30)]
    for patch, cell in enumerate(vision.patch_places()):
        said = {word for picture in drawn for word in picture[patch]}
        told = "large red circle" if cell == 3 else "empty"
        assert said == set(f"{told} {tiny_world.PLACES[cell]}".split())


def test_the_language_model_reads_only_about_scenes_of_its_split():
    samples = itertools.islice(language.world_samples(0, tiny_world.TRAIN), 400)
    by_place = [
        s.picture for s in samples if isinstance(s.picture, str) and s.picture.startswith("top left: ")
    ]
    for told in by_place:
        phrases = [part.split(": ")[1] for part in told.strip().split("; ")]
        things = [
            tiny_world.Thing(i, *phrase.split()) for i, phrase in enumerate(phrases) if phrase != "empty"
        ]
        assert tiny_world.split_of(things) == tiny_world.TRAIN
    assert len(by_place) > 10


def test_pixels_are_what_the_shipped_image_processor_makes():
    processor = AutoImageProcessor.from_pretrained(
        shipped.TOWERS / shipped.VISION, local_files_only=True, backend="pil"
    )
    rng = random.Random(0)
    picture = vision.picture(tiny_world.arrange(rng), rng)
    made = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(vision.pixels([picture]), made, atol=1e-5, rtol=0)


def test_a_short_training_run_is_repeatable(monkeypatch):
    monkeypatch.setattr(language, "CYCLES", ((2.5e-3, 3), (1e-3, 2)))
    torch.set_num_threads(1)
    samples = itertools.islice(language.world_samples(0, tiny_world.TRAIN), 200)
    tokenizer = train_tokenizer(text for sample in samples for text in sample.texts)
    first, second = (language.train_language(tokenizer, 3, lambda line: None) for _ in range(2))
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, second.state_dict()[name], atol=0, rtol=0, msg=name)
    tower = vision.train_vision(tokenizer, 3, lambda line: None, steps=2)
    hidden = tower(pixel_values=torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states
    assert hidden[vision.READ_LAYER].shape == (1, 17, vision.WIDTH)
