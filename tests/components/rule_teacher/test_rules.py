import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import tiny_world
from components.rule_teacher import rules
from components.rule_teacher.words import COCO_NAMES, plural, with_article

STREET = [
    ("person", (10.0, 10.0, 100.0, 300.0)),
    ("dog", (400.0, 300.0, 100.0, 90.0)),
    ("traffic light", (500.0, 20.0, 20.0, 60.0)),
    ("person", (300.0, 200.0, 80.0, 100.0)),
]
STREET_CAPTIONS = ["A man walks his dog past a shop.", "Two people and a dog on a street."]


def _asked(objects, times=60, captions=(), turns=8):
    rng = random.Random(0)
    return [
        turn for _ in range(times) for turn in rules.conversation(captions, objects, 640, 480, rng, turns)
    ]


def _answers(objects, **how):
    return {turn.question: turn.answer for turn in _asked(objects, **how)}


def test_same_random_state_gives_the_same_words():
    told = (STREET_CAPTIONS, STREET, 640, 480)
    for write in (rules.detail, rules.reasoning):
        assert write(*told, random.Random(4)) == write(*told, random.Random(4))
    first = rules.conversation(*told, random.Random(4), 5)
    assert first == rules.conversation(*told, random.Random(4), 5)
    assert first != rules.conversation(*told, random.Random(5), 5)


def test_answers_follow_from_coco_boxes():
    answers = _answers(STREET, captions=STREET_CAPTIONS)
    assert answers["How many people are there?"] == "Two."
    assert answers["Where is the traffic light?"] == "Top right."
    assert answers["Which is bigger, the dog or the traffic light?"] == "Dog."
    assert answers["Which is smaller, the dog or the traffic light?"] == "Traffic light."
    assert answers["Is the traffic light above or below the dog?"] == "Above."
    assert answers["Is there a dog in the picture?"] == "Yes."


def test_what_cannot_be_told_apart_is_not_asked_about():
    singular = re.compile(r"\bthe person\b")
    assert not [turn for turn in _asked(STREET) if singular.search(turn.question)]


def test_a_thing_in_the_middle_has_no_place():
    middle = [("dog", (300.0, 220.0, 40.0, 40.0))]
    assert "where" not in {turn.kind for turn in _asked(middle)}


def test_things_of_about_one_size_are_not_compared():
    alike = [("dog", (0.0, 0.0, 100.0, 100.0)), ("cat", (400.0, 300.0, 110.0, 110.0))]
    assert "size" not in {turn.kind for turn in _asked(alike)}


def test_diagonal_neighbours_are_not_related():
    diagonal = [("dog", (0.0, 0.0, 100.0, 100.0)), ("cat", (400.0, 310.0, 100.0, 100.0))]
    assert "relation" not in {turn.kind for turn in _asked(diagonal)}


def test_a_crowd_is_left_alone():
    crowd = [("person", (float(x), 0.0, 10.0, 10.0)) for x in range(0, 400, 20)] + [
        ("dog", (500, 400, 30, 30))
    ]
    assert {turn.kind for turn in _asked(crowd)} == {"exists"}


def test_no_is_never_said_of_what_a_caption_mentions():
    captions = ["A bus waits beside a bench while someone eats an orange."]
    denied = [turn.question for turn in _asked(STREET, times=400, captions=captions) if turn.answer == "No."]
    assert denied
    assert not [q for q in denied if re.search(r"\b(bus|bench|orange)\b", q)]


def test_yes_and_no_are_balanced():
    answers = Counter(turn.answer for turn in _asked(STREET, times=400, turns=4) if turn.kind == "exists")
    assert set(answers) == {"Yes.", "No."}
    assert 0.4 < answers["Yes."] / answers.total() < 0.6


def test_colours_are_asked_only_of_categories_that_name_one():
    assert {turn.kind for turn in _asked(STREET)}.isdisjoint({"colour", "shape", "what"})
    answers = _answers([("red circle", (10.0, 10.0, 50.0, 50.0)), ("blue square", (500.0, 10.0, 50.0, 50.0))])
    assert answers["What colour is the circle?"] == "Red."
    assert answers["What shape is the blue object?"] == "Square."
    assert answers["What is in the top left?"] == "A red circle."


def test_the_total_is_asked_only_where_every_object_is_described():
    assert not [turn for turn in _asked(STREET) if "objects" in turn.question]


def test_unknown_objects_leave_the_captions_to_speak():
    turns = _asked(None, captions=STREET_CAPTIONS, times=30)
    assert {turn.question for turn in turns} <= set(rules.BRIEF_REQUESTS)
    assert {turn.answer for turn in turns} <= set(STREET_CAPTIONS)
    told = (STREET_CAPTIONS, None, 640, 480, random.Random(0))
    assert rules.detail(*told) is not None
    assert rules.reasoning(*told) is None


def test_no_objects_is_an_answer_and_nothing_known_is_none():
    assert {turn.answer for turn in _asked([])} == {"None.", "No."}
    assert rules.conversation([], None, 640, 480, random.Random(0), 3) == []
    assert rules.detail([], [], 640, 480, random.Random(0)) is None


def test_detail_counts_every_kind():
    turn = rules.detail(STREET_CAPTIONS, STREET, 640, 480, random.Random(1))
    assert "two people, a dog and a traffic light" in turn.answer


def test_reasoning_answers_agree_with_the_boxes():
    pair = [("dog", (0.0, 0.0, 200.0, 200.0)), ("cat", (500.0, 0.0, 50.0, 50.0))]
    answers = {}
    for seed in range(40):
        turn = rules.reasoning([], pair, 640, 480, random.Random(seed))
        answers[turn.question] = turn.answer
    assert any("from left to right" in question for question in answers)
    for question, answer in answers.items():
        if "from left to right" in question:
            assert answer.startswith("You would come to the dog first")
        elif "from right to left" in question:
            assert answer.startswith("You would come to the cat first")
        else:
            assert answer.startswith("The dog takes up more room")


def test_every_request_list_is_long_enough_and_without_repeats():
    assert len(set(rules.BRIEF_REQUESTS)) == len(rules.BRIEF_REQUESTS) >= 11
    assert len(set(rules.DETAIL_REQUESTS)) == len(rules.DETAIL_REQUESTS) >= 5


def test_guessing_blindly_stays_under_half():
    rng = random.Random(0)
    answers: dict[str, Counter] = {}
    for scene in tiny_world.scenes(0, 1500):
        for turn in rules.conversation(scene.captions, scene.objects, scene.width, scene.height, rng, 8):
            answers.setdefault(turn.kind, Counter())[turn.answer] += 1
    assert set(answers) == set(rules.ASK)
    best = [max(counts.values()) / counts.total() for counts in answers.values()]
    assert sum(best) / len(best) < 0.4


@pytest.mark.parametrize(
    ("one", "many"),
    [("bus", "buses"), ("person", "people"), ("traffic light", "traffic lights"), ("sheep", "sheep")],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_articles():
    assert [with_article(n) for n in ("apple", "dog", "skis")] == ["an apple", "a dog", "skis"]


_boxes = st.tuples(*[st.floats(0, 400, width=32)] * 2, *[st.floats(1, 200, width=32)] * 2)
_categories = st.sampled_from([*COCO_NAMES, "red circle", "blue square"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_categories, _boxes), max_size=20) | st.none(),
    st.integers(0, 2**31),
    st.integers(1, 6),
)
def test_any_picture_gets_well_formed_turns_and_no_word_of_boxes(objects, seed, turns):
    told = (["Something is to be seen."], objects, 600, 600)
    rng = random.Random(seed)
    conversation = rules.conversation(*told, rng, turns)
    assert len(conversation) <= turns
    assert len({turn.question for turn in conversation}) == len(conversation)
    extra = [turn for turn in (rules.detail(*told, rng), rules.reasoning(*told, rng)) if turn]
    for turn in [*conversation, *extra]:
        assert turn.question[-1] in "?."
        assert turn.answer.endswith(".") and turn.answer[0].isupper()
        assert not re.search(r"caption|\bbox|coordinate|[{}]", turn.question + turn.answer)
