"""Which photo gets which types of samples: seeded, each type at most once a photo, the shares kept exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping


def types_of(photo: str, shares: Mapping[str, float], per_photo: int, seed: int) -> list[str]:
    """The types of one photo's samples, in the order of `shares`.

    Systematic sampling: every type has an interval as long as its expected number, and one random offset per
    photo decides which intervals are met. So the shares hold over the set, and no type comes twice. Where
    `per_photo` would take more than one of the most frequent type, all are scaled down alike.
    """
    total = sum(shares.values())
    expected = {kind: share / total * per_photo for kind, share in shares.items() if share > 0}
    scale = max(1.0, *expected.values())
    offset = random.Random(f"instruct types {seed} {photo}").random()
    chosen, start = [], 0.0
    for kind, length in expected.items():
        end = start + length / scale
        if math.ceil(end - offset) > math.ceil(start - offset):
            chosen.append(kind)
        start = end
    return chosen
