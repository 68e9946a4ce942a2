"""The rule of the filter on numbers, against a plain reading of it."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pyarrow as pa
import pytest

from components.filter.choice import Counts, Postings, by_rarity, choose, count, joined, look_up
from components.filter.phrases import SCHEMA


def file_of(rows: list[list[str] | None], start: int = 0) -> pa.Table:
    names = [f"row {start + number}" for number in range(len(rows))]
    return pa.table({"id": names, "phrases": rows}, schema=SCHEMA)


def chosen(
    rows: list[list[str]], cap: int, count_chosen: bool = False, seed: int = 0, minimum: int = 3, cut: int = 7
) -> set[int]:
    """The filter's arithmetic over files of `cut` rows."""
    files = [file_of(rows[start : start + cut], start) for start in range(0, len(rows), cut)]
    counts = Counts()
    for one in files:
        counts.add(count(one))
    phrases = by_rarity(counts.total())
    vocabulary = phrases.filter(pa.compute.greater_equal(phrases["rows"], minimum))["phrase"].combine_chunks()
    postings = joined([look_up(one, vocabulary) for one in files])
    return set(np.flatnonzero(choose(postings, vocabulary, cap, count_chosen, seed)).tolist())


def world(seed: int, size: int = 400) -> list[list[str]]:
    """Rows of phrases, some frequent, most rare."""
    rng = random.Random(seed)
    return [
        list(dict.fromkeys(f"p{int(rng.paretovariate(0.7))}" for _ in range(rng.randrange(4))))
        for _ in range(size)
    ]


def holders(rows: list[list[str]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for number, phrases in enumerate(rows):
        for phrase in phrases:
            found.setdefault(phrase, set()).add(number)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_phrase_that_counts_keeps_all_its_rows_or_at_least_as_many_as_the_cap(seed: int) -> None:
    rows, cap = world(seed), 10
    kept = chosen(rows, cap, seed=seed)
    counting = {phrase: found for phrase, found in holders(rows).items() if len(found) >= 3}
    assert any(len(found) > cap for found in counting.values()) and len(kept) < len(rows)
    for found in counting.values():
        assert len(found & kept) >= min(len(found), cap)
        assert found <= kept or len(found) > cap
    assert kept <= set.union(*counting.values())


def plainly(rows: list[list[str]], cap: int, count_chosen: bool, seed: int) -> set[int]:
    """The rule as one would tell it, with Python's numbers."""

    def first_bytes(text: str) -> int:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

    def draw(phrase: str, row: int) -> int:
        value = first_bytes(f"{seed}:{phrase}") ^ first_bytes(f"row {row}")
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    found, pool = holders(rows), set[int]()
    for phrase in sorted(found, key=lambda one: (len(found[one]), one)):
        if len(found[phrase]) < 3:
            continue
        if len(found[phrase]) <= cap:
            pool |= found[phrase]
            continue
        drawn = sorted(found[phrase], key=lambda row: draw(phrase, row))
        if count_chosen:
            room = max(0, cap - len(found[phrase] & pool))
            drawn = [row for row in drawn if row not in pool][:room]
        pool |= set(drawn[:cap])
    return pool


@pytest.mark.parametrize("count_chosen", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_the_rule_told_plainly(seed: int, count_chosen: bool) -> None:
    rows = world(seed)
    assert chosen(rows, 10, count_chosen, seed) == plainly(rows, 10, count_chosen, seed)


def test_the_draw_is_even_over_the_rows_of_a_phrase_and_changes_with_the_seed() -> None:
    rows = [["dog"]] * 50
    times = np.zeros(50)
    for seed in range(400):
        drawn = chosen(rows, 10, seed=seed)
        assert len(drawn) == 10
        times[list(drawn)] += 1
    # 80 expected, standard deviation 8.
    assert times.min() > 40 and times.max() < 120


@pytest.mark.parametrize("count_chosen", [False, True])
def test_how_rows_are_cut_into_files_changes_nothing(count_chosen: bool) -> None:
    rows = world(1)
    expected = chosen(rows, 5, count_chosen)
    assert all(chosen(rows, 5, count_chosen, cut=cut) == expected for cut in (1, 13, 400))


def test_two_phrases_of_the_same_rows_draw_differently() -> None:
    kept = chosen([["dog", "cat"]] * 200, 10)
    assert 14 < len(kept) <= 20


def test_phrases_are_counted_once_a_row_over_many_files() -> None:
    counts = Counts()
    for _ in range(3):
        counts.add(count(file_of([["a", "b"], [], None, ["a"]])))
    assert by_rarity(counts.total()).to_pydict() == {"phrase": ["b", "a"], "rows": [3, 6]}
    assert Counts().total().num_rows == 0


def test_counts_that_are_added_up_in_between_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.filter.choice.PENDING", 5)
    counts = Counts()
    for number in range(40):
        counts.add(count(file_of([["a", f"b{number % 4}"]])))
    assert by_rarity(counts.total()).to_pydict()["rows"] == [10, 10, 10, 10, 40]


def test_rows_without_captions_or_phrases_are_told_apart() -> None:
    postings: Postings = look_up(file_of([["a"], [], None, ["b"]]), pa.array(["a"]))
    assert postings.captions.tolist() == [True, True, False, True]
    assert postings.phrases.tolist() == [True, False, False, True]
    assert (postings.phrase.tolist(), postings.row.tolist()) == ([0], [0])
