import io
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from components import tiny_world
from components.tiny_world import HELD_OUT_SPLIT, TRAIN, Thing


def _pixels(scene: tiny_world.Scene) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(scene.png)).convert("RGB")).astype(int)


def test_same_seed_and_index_give_the_same_scene_in_any_order():
    forwards = [tiny_world.scene(3, index) for index in range(5)]
    backwards = [tiny_world.scene(3, index) for index in reversed(range(5))]
    assert forwards == backwards[::-1]
    assert tiny_world.scene(3, 0) != tiny_world.scene(4, 0)


def test_pictures_are_64_px_rgb_and_never_repeat_for_the_same_arrangement():
    scene = tiny_world.scene(0, 0)
    image = Image.open(io.BytesIO(scene.png))
    assert (image.size, image.mode, scene.width, scene.height) == ((64, 64), "RGB", 64, 64)
    things = [Thing(0, "large", "red", "circle")]
    pictures = {
        tiny_world.draw(things, tiny_world.boxes(things, rng), rng).tobytes()
        for rng in map(random.Random, range(20))
    }
    assert len(pictures) == 20


def test_boxes_hold_exactly_what_was_painted():
    for scene in tiny_world.scenes(5, 30):
        pixels = _pixels(scene)
        painted = np.abs(pixels - pixels[0, 0]).sum(-1) > 30
        boxed = np.zeros_like(painted)
        for _, (x, y, width, height) in scene.objects:
            left, top, right, bottom = int(x), int(y), int(np.ceil(x + width)), int(np.ceil(y + height))
            boxed[top : bottom + 1, left : right + 1] = True
            inside = painted[top : bottom + 1, left : right + 1]
            assert abs(inside.any(0).sum() - width) <= 2
            assert abs(inside.any(1).sum() - height) <= 2
        assert not (painted & ~boxed).any()


def test_the_colour_in_the_middle_of_a_box_is_the_categorys_colour():
    for scene in tiny_world.scenes(6, 30):
        pixels = _pixels(scene)
        for category, (x, y, width, height) in scene.objects:
            middle = pixels[int(y + height / 2), int(x + width / 2)]
            distance = {name: np.abs(middle - value).sum() for name, value in tiny_world.COLOURS.items()}
            assert min(distance, key=lambda name: distance[name]) == category.split()[0]


def test_captions_that_name_places_name_every_thing_at_its_place():
    things = [Thing(1, "small", "blue", "cross"), Thing(2, "large", "red", "circle")]
    by_place, sentence, mixed, _ = tiny_world.captions(things, random.Random(0))
    assert by_place == (
        "top left: empty; top right: small blue cross; bottom left: large red circle; bottom right: empty"
    )
    assert sentence == "a small blue cross at the top right and a large red circle at the bottom left"
    assert "a small blue cross in the top right corner" in mixed


def test_no_seed_puts_a_held_out_combination_into_training():
    def combination(scene: tiny_world.Scene) -> frozenset:
        return frozenset((category, x > 32, y > 32) for category, (x, y, _, _) in scene.objects)

    held_out = {combination(s) for s in tiny_world.scenes(0, 300, HELD_OUT_SPLIT)}
    train = {combination(s) for seed in (0, 1, 2) for s in tiny_world.scenes(seed, 500, TRAIN)}
    assert held_out and train and not held_out & train


def test_split_is_blind_to_size_and_order():
    rng = random.Random(1)
    for _ in range(50):
        things = tiny_world.arrange(rng)
        other = [replace(t, size="small" if t.size == "large" else "large") for t in reversed(things)]
        assert tiny_world.split_of(other) == tiny_world.split_of(things)


def test_held_out_share_is_about_what_is_named():
    rng = random.Random(2)
    share = sum(tiny_world.split_of(tiny_world.arrange(rng)) == HELD_OUT_SPLIT for _ in range(4000)) / 4000
    assert abs(share - tiny_world.HELD_OUT_SHARE) < 0.03


def test_scenes_of_a_split_are_the_series_without_the_others():
    both = [s for s in tiny_world.scenes(7, 60) if s.split == TRAIN]
    assert list(tiny_world.scenes(7, len(both), TRAIN)) == both


def test_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="'test'"):
        next(tiny_world.scenes(0, 1, "test"))
