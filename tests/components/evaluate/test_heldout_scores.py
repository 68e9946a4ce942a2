"""Exact match and loss of the held-out questions."""

from __future__ import annotations

import pytest

from components.evaluate.heldout_scores import metrics
from tests.support.evaluated import answered


def test_the_loss_is_a_mean_over_tokens_and_not_over_questions() -> None:
    found = metrics([answered("a", True), answered("b", False), answered("b", False)], "vqa")
    assert found["eval/loss"] == pytest.approx(9 / 10)
    assert found["eval/vqa/exact_match"] == pytest.approx(100 / 3)
    assert found["eval/vqa/a/blank_image"] == 0


def test_a_kind_with_odd_characters_gets_a_name_that_mlflow_takes() -> None:
    found = metrics([answered("what's / where?", True)], "vqa")
    assert found["eval/vqa/what_s _ where_/exact_match"] == 100
