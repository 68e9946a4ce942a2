"""What a kind of input is: how one is made, and who reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from tests.support.fuzzing import Make

Readers = list[Callable[[], object]]
Kind = tuple[Make, Callable[[Any], Readers]]
"""The inputs, and what reads one."""
SAMPLE = {"id": "a", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                         {"from": "gpt", "value": "It."}]}  # fmt: skip


def allowing(kind: type[Exception], work: Callable[[], object]) -> Callable[[], object]:
    """`work`, whose callers know what to do with such an error."""

    def done() -> None:
        with contextlib.suppress(kind):
            work()

    return done
