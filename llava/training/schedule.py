"""The learning rate over the steps: linear warm-up, then a cosine to zero (v1.5, table 9)."""

import math


def cosine_with_warmup(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """The rate for the update number `step` (0 is the first) of `total`."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
