"""Attention that stays inside a sample when several samples are packed into one row.

Two kernels compute it: `varlen` (flash attention over the whole row, on CUDA in half precision) and `sdpa` (a
causal call per sample, anywhere); `choose` says which one runs. Both are registered with transformers
and set on the text model for training only. A row is described by its `Segments`, which travel as a keyword
argument through the stock forward pass. Generation has a cache and padding, which these functions do not
know: it uses transformers' own SDPA with masks.

Shapes: B = 1 row, H query heads, G key and value heads (H is a multiple of G), T tokens of the row, D head size,
S segments.
"""

import inspect
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from llava.errors import RefusedInput

Kernel = Literal["varlen", "sdpa"]

SEGMENTS = "llava_segments"
PACKING = {"auto": SEGMENTS, "varlen": f"{SEGMENTS}_varlen", "sdpa": f"{SEGMENTS}_sdpa"}
"""What a config may ask for -> the name under which transformers knows it."""

_VARLEN_HEAD = 256
_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Segments:
    """Where the samples of a packed row lie: one after the other, nothing between them."""

    lengths: tuple[int, ...]
    bounds: torch.Tensor
    """(S + 1,) int32, in the host's memory: where each begins, and the end of the last."""
    _on: dict[torch.device, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> torch.Tensor:
        """`bounds` on `device`, copied when a kernel first asks: one that calls each sample by itself never does."""
        if device == self.bounds.device:
            return self.bounds
        if device not in self._on:
            self._on[device] = self.bounds.to(device, non_blocking=True)
        return self._on[device]

    def pinned(self) -> "Segments":
        """The same with `bounds` in page-locked memory."""
        return Segments(self.lengths, self.bounds.pin_memory())


def segments(lengths: list[int]) -> Segments:
    """Segments of `lengths` tokens."""
    return Segments(tuple(lengths), torch.tensor([0, *lengths]).cumsum(0).int())


def packing_attention(requested: str) -> str:
    """The attention to set on the text model; refuses one that would let samples see each other."""
    if requested not in PACKING:
        raise RefusedInput(
            f"attention {requested!r} cannot pack: it does not know where a sample ends; "
            f"choose one of {', '.join(PACKING)}"
        )
    return PACKING[requested]


@lru_cache
def choose(
    requested: str, device: torch.device, dtype: torch.dtype, head: int, dropout: bool = False
) -> Kernel:
    """The kernel that computes attention `requested`; `auto` takes `varlen` wherever it runs.

    Raises `RefusedInput` where `varlen` is asked for and cannot run.
    """
    if requested == "sdpa":
        return "sdpa"
    reason = "has no dropout" if dropout else _not_varlen(device, dtype, head)
    if reason is None:
        return "varlen"
    if requested == "varlen":
        raise RefusedInput(f"attention 'varlen' {reason}; choose 'auto' or 'sdpa'")
    return "sdpa"


def _not_varlen(device: torch.device, dtype: torch.dtype, head: int) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, not {dtype}"
    if head > _VARLEN_HEAD or head % 8:
        return f"needs heads of at most {_VARLEN_HEAD} in steps of 8, not {head}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    requested: str = "auto",
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), None. Causal inside each segment."""
    if segments is None:
        raise ValueError(
            f"attention {SEGMENTS!r} needs `segments`; for generation set the text model to 'sdpa'"
        )
    if choose(requested, query.device, query.dtype, query.shape[-1], dropout > 0) == "varlen":
        return varlen(query, key, value, segments, scaling), None
    return sdpa(query, key, value, segments, scaling, dropout), None


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """A causal call per segment on views of the row: nothing is padded and nothing copied on the way in."""
    grouped = query.shape[1] != key.shape[1]
    parts = (part.split(segments.lengths, dim=2) for part in (query, key, value))
    mixed = [
        functional.scaled_dot_product_attention(
            one_query, one_key, one_value, None, dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        for one_query, one_key, one_value in zip(*parts, strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in mixed], dim=1)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None = None,
) -> torch.Tensor:
    """One flash-attention call for the row; CUDA, bf16 or fp16."""
    row_query, row_key, row_value = (part[0].transpose(0, 1) for part in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _GROUPED:
            options["enable_gqa"] = True
        else:
            row_key, row_value = (part.repeat_interleave(groups, dim=1) for part in (row_key, row_value))
    longest = max(segments.lengths)
    bounds = segments.on(query.device)
    mixed: Any = varlen_attn(row_query, row_key, row_value, bounds, bounds, longest, longest, **options)
    row: torch.Tensor = mixed.unsqueeze(0)
    return row


AttentionInterface.register(SEGMENTS, segment_attention)
for _requested in ("varlen", "sdpa"):
    AttentionInterface.register(PACKING[_requested], partial(segment_attention, requested=_requested))
