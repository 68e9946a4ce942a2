"""Ten families of the zoo; `make drills` measures all."""

import pytest

from benchmarks.model_zoo import EQUAL, REFUSED, measure

TEN = {
    "llama": (EQUAL, "segments"),
    "qwen3": (EQUAL, "segments"),
    "stablelm": (EQUAL, "mask over the row"),
    "mpt": (EQUAL, "mask over the row, the head becomes a copy of the embedding"),
    "opt": (EQUAL, "the head becomes a copy of the embedding"),
    "lfm2": (REFUSED, "packed"),
    "qwen3_next": (REFUSED, "packed"),
    "gemma2": (REFUSED, "its logits differ from its own"),
    "phi": (REFUSED, "no place for all of its weights, such as lm_head.bias"),
    "bloom": (REFUSED, "cannot be told where a packed sample ends"),
}


@pytest.mark.parametrize("family", TEN)
def test_a_family_computes_what_it_computes_alone_or_is_refused_in_one_line(family: str) -> None:
    row = measure(family)
    outcome, told = TEN[family]
    assert row.outcome == outcome and told in row.told and "\n" not in row.told
    assert (row.difference is not None) == (outcome == EQUAL)
