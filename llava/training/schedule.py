"""The learning rate over the steps: linear warm-up, then a cosine to zero (v1.5, table 9)."""

import math


def cosine_with_warmup(
    step: int, total: int, peak: float, warmup_ratio: float, from_zero: bool = False
) -> float:
    """The rate for the update number `step` (0 is the first) of `total`.

    `from_zero`: the first update has rate 0, as with the Trainer of transformers; else the warm-up is one update
    ahead, so that none is made in vain. After the warm-up both are the same.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + (not from_zero)) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
