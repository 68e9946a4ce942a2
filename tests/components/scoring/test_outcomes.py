"""Scores without the questions that were left out: everything that is told counts the same questions."""

from __future__ import annotations

import pytest

from components.scoring.benchmarks import find
from components.scoring.outcomes import unit_name, without
from tests.components.scoring.benchmarks.test_golden import files

EXAMS = ("vqa", "pope", "scienceqa", "llava-bench")


@pytest.mark.parametrize("benchmark", EXAMS)
def test_failures_are_those_of_the_questions_that_are_left(benchmark: str) -> None:
    every = find(benchmark).score(files(benchmark))
    assert every.failed > 0
    for name in {unit_name(benchmark, unit) for unit in every.units}:
        gone = [unit for unit in every.units if unit_name(benchmark, unit) == name]
        found = without(every, {name})
        assert found.n == every.n - len(gone)
        assert found.failed == every.failed - sum(unit.failed for unit in gone)
    failed = {unit_name(benchmark, unit) for unit in every.units if unit.failed}
    assert without(every, failed).failed == 0


def test_what_was_counted_over_all_questions_says_so_or_is_dropped() -> None:
    every = find("scienceqa").score(files("scienceqa"))
    found = without(every, {unit_name("scienceqa", every.units[0])})
    assert every.extra and not found.extra
    assert found.remarks == [
        f"{remark} (counted with the 1 of 8 that are left out)" for remark in every.remarks
    ]
    assert without(every, {"no such question"}) is every
