"""Attention that stays inside a sample when several samples are packed into one row.

Registered with transformers under `SEGMENTS` and set on the text model for training only. A row is
described by its `Segments`; they travel as a keyword argument through the stock forward pass. Segments of
similar length are computed together as one right-padded causal batch: padding at the end needs no mask,
since no earlier position looks at it.

Shapes: B = 1 row, H heads, T tokens of the row, D head size, S segments of a bucket, L its longest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

SEGMENTS = "llava_segments"
_WASTE = 1.25


@dataclass(frozen=True)
class Segments:
    """Where the samples of a packed row lie."""

    lengths: tuple[int, ...]
    buckets: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Per bucket: `gather` (S, L), each padded slot's row position; `scatter`, the flat slots that are real."""
    order: torch.Tensor
    """(T,): where each row position stands in the concatenated outputs of the buckets."""

    def to(self, device: torch.device | str) -> "Segments":
        """The same on another device."""
        buckets = tuple((gather.to(device), scatter.to(device)) for gather, scatter in self.buckets)
        return Segments(self.lengths, buckets, self.order.to(device))


def segments(lengths: list[int]) -> Segments:
    """Buckets for segments of `lengths` tokens that lie one after the other; the padding stays under 25 %."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ranked = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in ranked:
        if groups and lengths[groups[-1][0]] <= _WASTE * lengths[index]:
            groups[-1].append(index)
        else:
            groups.append([index])
    buckets, real = [], []
    for group in groups:
        longest = lengths[group[0]]
        slots = torch.arange(longest)
        begin = starts[group]
        size = torch.tensor([lengths[index] for index in group])
        inside = slots[None] < size[:, None]
        gather = torch.where(inside, begin[:, None] + slots[None], begin[:, None])
        scatter = inside.flatten().nonzero().squeeze(1)
        buckets.append((gather, scatter))
        real.append(gather.flatten()[scatter])
    return Segments(tuple(lengths), tuple(buckets), torch.cat(real).argsort())


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D), None. Causal inside each segment."""
    if segments is None:
        raise ValueError(
            f"attention {SEGMENTS!r} needs `segments`; for generation set the text model to 'sdpa'"
        )
    grouped = query.shape[1] != key.shape[1]
    out = []
    for gather, scatter in segments.buckets:
        count, longest = gather.shape
        picked_q, picked_k, picked_v = (
            part[0].index_select(1, gather.flatten()).view(part.shape[1], count, longest, -1).transpose(0, 1)
            for part in (query, key, value)
        )
        mixed = functional.scaled_dot_product_attention(
            picked_q, picked_k, picked_v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        out.append(mixed.transpose(1, 2).flatten(0, 1).index_select(0, scatter))
    return torch.cat(out).index_select(0, segments.order).unsqueeze(0), None


AttentionInterface.register(SEGMENTS, segment_attention)
