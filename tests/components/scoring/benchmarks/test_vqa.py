"""Exact match."""

from __future__ import annotations

import pytest

from components.scoring.benchmarks.vqa import is_match


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" Red. ", "red", True),
        ("two", "2", True),
        ("The red one!", "red one.", True),
        ("red", "red.", True),
        ("red apple", "red", False),
        ("", "", False),
    ],
)
def test_exact_match(answer: str, expected: str, right: bool) -> None:
    assert is_match(answer, expected) is right
