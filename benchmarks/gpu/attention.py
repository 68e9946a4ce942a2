"""Attention of packed rows, kernel by kernel, against arithmetic in fp64 that has a mask for each sample."""

import math
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.bench import PRECISIONS, Bench
from benchmarks.gpu.findings import EPSILON, Findings, allowed
from llava import attention
from llava.attention import Segments, segments
from llava.errors import RefusedInput

LENGTHS = {"cpu": [7, 1, 64, 129, 2, 30], "cuda": [700, 1, 64, 129, 1176, 2, 333, 128, 577]}
"""Samples of a row: one token, ends of a kernel's blocks and one beyond, and the lengths of stage 2."""
HEADS = ((4, 4, 64), (6, 2, 64), (4, 4, 128), (4, 1, 32))
"""Query heads, key and value heads, size of a head."""
Parts = tuple[torch.Tensor, ...]


def check(bench: Bench, findings: Findings) -> None:
    """Output and gradients of both kernels, in each precision, for heads that share keys and heads that do not."""
    lengths = LENGTHS[bench.device.type]
    ran = set()
    for heads, groups, size in HEADS[:2] if bench.short else HEADS:
        for dtype, precision in PRECISIONS.items():
            parts, upstream = _drawn(bench, sum(lengths), heads, groups, size)
            exact = _exact([part.to(dtype).double() for part in parts], upstream.to(dtype).double(), lengths)
            ready = [part.to(dtype, copy=True).requires_grad_() for part in parts]
            plain = _errors(_plain(ready, lengths), ready, upstream.to(dtype), exact, lengths)
            for kernel in ("varlen", "sdpa"):
                name = f"{kernel}, {heads}:{groups} heads of {size}, {precision}"
                try:
                    attention.choose(kernel, bench.device, dtype, size)
                except RefusedInput as refused:
                    findings.without(f"{kernel} in {precision}", str(refused).partition(";")[0])
                    continue
                out = _ours(kernel, ready, segments(lengths))
                found = _errors(out, ready, upstream.to(dtype), exact, lengths)
                for what, error in found.items():
                    findings.within(f"{name}: {what}", error, allowed(plain[what], EPSILON[dtype]))
                ran.add(f"{kernel} in {precision}")
    findings.parts_left_out = sorted(set(findings.parts_left_out))
    findings.say(f"{', '.join(sorted(ran))} against fp64; {findings.worst()}")


def _drawn(bench: Bench, tokens: int, heads: int, groups: int, size: int) -> tuple[Parts, torch.Tensor]:
    """Query (1, H, T, D), key and value (1, G, T, D), and the gradient of the output (1, T, H, D)."""
    # Drawn on the CPU, so that every device gets the same numbers.
    random = torch.Generator().manual_seed(bench.seed)
    shapes = [(1, count, tokens, size) for count in (heads, groups, groups)] + [(1, tokens, heads, size)]
    *parts, upstream = [torch.randn(shape, generator=random).to(bench.device) for shape in shapes]
    # Scores that are spread widely: a token's attention is on few others, so that a wrong one shows.
    parts[0] *= 3
    return tuple(parts), upstream


def _ours(kernel: str, parts: list[torch.Tensor], where: Segments) -> torch.Tensor:
    """As the model calls it: the function that transformers knows, with the row's segments."""
    function: Any = attention.segment_attention
    out, _ = function(torch.nn.Identity(), *parts, None, segments=where, requested=kernel)
    return out


def _plain(parts: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """Each sample by itself through torch's SDPA, keys and values repeated."""
    query, key, value = parts
    times = query.shape[1] // key.shape[1]
    done = []
    for one in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        alone = [one[0], *(part.repeat_interleave(times, dim=1) for part in one[1:])]
        done.append(functional.scaled_dot_product_attention(*alone, is_causal=True).transpose(1, 2))
    return torch.cat(done, dim=1)


def _exact(parts: list[torch.Tensor], upstream: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Softmax over scores with a mask, written out; fp64. Output (1, T, H, D) and gradients (1, T, H or G, D)."""
    ready = [part.requires_grad_() for part in parts]
    times = ready[0].shape[1] // ready[1].shape[1]
    done = []
    for one in zip(*(part.split(lengths, dim=2) for part in ready), strict=True):
        q, k, v = one[0], *(part.repeat_interleave(times, dim=1) for part in one[1:])
        ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(ahead, -math.inf)
        done.append((scores.softmax(-1) @ v).transpose(1, 2))
    return _results(torch.cat(done, dim=1), ready, upstream)


def _results(out: torch.Tensor, parts: list[torch.Tensor], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(out, parts, upstream)
    names = ("gradient of queries", "gradient of keys", "gradient of values")
    found = {name: gradient.transpose(1, 2) for name, gradient in zip(names, gradients, strict=True)}
    return {"output": out.detach(), **found}


def _errors(
    out: torch.Tensor,
    parts: list[torch.Tensor],
    upstream: torch.Tensor,
    exact: dict[str, torch.Tensor],
    lengths: list[int],
) -> dict[str, float]:
    """Of the sample that is off the most: its root mean square error over that of the whole row's values."""
    errors = {}
    for what, found in _results(out, parts, upstream).items():
        if found.shape != exact[what].shape:
            errors[what] = math.inf
            continue
        size = exact[what].pow(2).mean().sqrt()
        off = (found.detach().double() - exact[what]).pow(2).split(lengths, dim=1)
        worst = max(float(part.mean().sqrt() / size) for part in off)
        errors[what] = worst if math.isfinite(worst) else math.inf
    return errors
