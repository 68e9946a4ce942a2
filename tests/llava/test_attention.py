"""Attention of packed rows: what a sample sees, which kernel runs, and what is refused."""

import pytest
import torch
from torch.nn import functional

from llava.attention import PACKING, choose, packing_attention, sdpa, segment_attention, segments, varlen
from llava.errors import RefusedInput

CPU = torch.device("cpu")


def row(heads: int, groups: int, lengths: list[int], size: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    tokens = sum(lengths)
    return tuple(torch.randn(1, count, tokens, size, requires_grad=True) for count in (heads, groups, groups))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_each_sample_gets_what_it_gets_alone_and_so_do_its_gradients(heads: int, groups: int) -> None:
    lengths = [7, 1, 30, 12]
    parts = row(heads, groups, lengths)
    packed, _ = segment_attention(torch.nn.Identity(), *parts, None, scaling=0.3, segments=segments(lengths))
    weights = torch.randn_like(packed)
    gradients = torch.autograd.grad((packed * weights).sum(), parts)
    begin = 0
    for length in lengths:
        inside = slice(begin, begin + length)
        alone = [part[:, :, inside].detach().requires_grad_() for part in parts]
        query, key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in alone)
        scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(
            torch.ones(length, length).triu(1).bool(), -1e9
        )
        expected = (scores.softmax(-1) @ value).transpose(1, 2)
        assert torch.allclose(packed[:, inside], expected, atol=1e-5)
        for mine, theirs in zip(
            gradients, torch.autograd.grad((expected * weights[:, inside]).sum(), alone), strict=True
        ):
            assert torch.allclose(mine[:, :, inside], theirs, atol=1e-4)
        begin += length


def test_one_sample_is_plain_causal_attention_in_bf16_too() -> None:
    query, key, value = (part.to(torch.bfloat16) for part in row(4, 4, [9]))
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.equal(sdpa(query, key, value, segments([9])), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_computes_with_sdpa(dtype: torch.dtype) -> None:
    assert choose("auto", CPU, dtype, 64) == choose("sdpa", CPU, dtype, 64) == "sdpa"


@pytest.mark.parametrize(
    ("device", "dtype", "head", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "needs a CUDA device, not cpu"),
        ("cuda", torch.float32, 64, "needs bf16 or fp16, not torch.float32"),
        ("cuda", torch.bfloat16, 320, "needs heads of at most 256 in steps of 8, not 320"),
    ],
)
def test_varlen_is_refused_where_it_cannot_run_and_auto_falls_back(
    device: str, dtype: torch.dtype, head: int, reason: str
) -> None:
    with pytest.raises(RefusedInput, match=reason):
        choose("varlen", torch.device(device), dtype, head)
    assert choose("auto", torch.device(device), dtype, head) == "sdpa"


@pytest.mark.parametrize("groups", [4, 2])
def test_the_varlen_call_has_the_shapes_of_the_other_kernel(groups: int) -> None:
    lengths = [5, 11]
    parts = [part.detach().to("meta", torch.bfloat16).requires_grad_() for part in row(4, groups, lengths)]
    out = varlen(*parts, segments(lengths))
    assert out.shape == (1, 16, 4, 16)
    gradients = torch.autograd.grad(out.sum(), parts)
    assert [gradient.shape for gradient in gradients] == [part.shape for part in parts]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen runs on CUDA only")
def test_varlen_and_sdpa_agree_on_the_gpu() -> None:
    lengths = [7, 130, 64]
    parts = [part.detach().to("cuda", torch.bfloat16).requires_grad_() for part in row(8, 2, lengths, 64)]
    where = segments(lengths)
    assert choose("auto", parts[0].device, torch.bfloat16, 64) == "varlen"
    outs = [kernel(*parts, where) for kernel in (varlen, sdpa)]
    assert torch.allclose(*(out.float() for out in outs), atol=2e-2)
    first, second = (torch.autograd.grad(out.float().square().sum(), parts) for out in outs)
    for mine, theirs in zip(first, second, strict=True):
        assert (mine - theirs).float().norm() < 2e-2 * theirs.float().norm()


def test_an_attention_that_cannot_pack_is_refused_by_name() -> None:
    with pytest.raises(
        RefusedInput, match=r"attention 'eager' cannot pack: .* choose one of auto, varlen, sdpa"
    ):
        packing_attention("eager")
    assert packing_attention("auto") == PACKING["auto"]


def test_a_call_without_segments_is_an_error_and_not_silently_unmasked() -> None:
    with pytest.raises(ValueError, match="needs `segments`"):
        segment_attention(torch.nn.Identity(), *row(2, 2, [4]), None)


def test_dropout_takes_the_kernel_that_has_it() -> None:
    with pytest.raises(RefusedInput, match="attention 'varlen' has no dropout"):
        choose("varlen", CPU, torch.float32, 16, dropout=True)
    query, key, value = row(2, 2, [40])
    torch.manual_seed(0)
    dropped, _ = segment_attention(
        torch.nn.Identity(), query, key, value, None, dropout=0.5, segments=segments([40])
    )
    assert not torch.allclose(dropped, sdpa(query, key, value, segments([40])))
