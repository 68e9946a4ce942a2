"""Every family of causal language models that transformers knows."""

import pytest

from benchmarks.model_zoo import DIFFERS, FAMILIES, TRACEBACK, measure, table


@pytest.mark.drill
def test_no_family_differs_in_silence_or_ends_in_a_traceback() -> None:
    rows = [measure(family) for family in FAMILIES]
    print(table(rows))
    assert not [row for row in rows if row.outcome in (DIFFERS, TRACEBACK)]
    assert len(rows) > 150
