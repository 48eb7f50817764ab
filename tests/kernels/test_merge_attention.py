"""Merged parts are attention over all of them; empty ones have no say and may hold anything."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.merge_attention import merge_attention, merge_attention_reference
from tests.kernels.accuracy import EPS, assert_accurate

SHAPES = pytest.mark.parametrize(
    ("num", "tokens", "heads", "dim", "dtype"),
    [
        (1, 2, 1, 64, torch.float32),
        (3, 1, 3, 80, torch.float32),
        (21, 2, 4, 128, torch.float32),
        (17, 1, 8, 96, torch.float16),
        (9, 3, 4, 256, torch.bfloat16),
    ],
    ids=["1-d64", "3-d80", "21-d128", "17-d96-fp16", "9-d256-bf16"],
)
ROUNDING = {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_merged(parts: torch.Tensor, part_lse: torch.Tensor, dtype: torch.dtype) -> None:
    """As accurate as plain torch, log-sum-exp wanted or not."""
    shape, device = parts.shape[1:], parts.device
    found, plain, exact = (
        (
            torch.empty(shape, dtype=one, device=device),
            torch.empty(shape[:2], dtype=two, device=device),
        )
        for one, two in ((dtype, torch.float32), (dtype, torch.float32), (torch.float64,) * 2)
    )
    merge_attention(parts, part_lse, *found)
    merge_attention_reference(parts, part_lse, *plain)
    merge_attention_reference(parts, part_lse, *exact)
    largest = parts[parts.isfinite()].abs().max().item()
    # The output is rounded once more than its float32 sum, whose weights err by a few roundings.
    assert_accurate(found[0], plain[0], exact[0], (ROUNDING[dtype] + 8 * EPS) * largest)
    known = exact[1][exact[1].isfinite()].abs().max().item()
    assert_accurate(found[1], plain[1], exact[1], 8 * EPS * max(known, 1))
    strided = torch.empty(shape[0], shape[1] + 1, shape[2] + 8, dtype=dtype, device=device)
    strided = strided[:, :-1, :-8]
    merge_attention(parts, part_lse, strided)
    assert torch.equal(strided, found[0])


@SHAPES
def test_accuracy(
    num: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    parts = torch.randn(num, tokens, heads, dim).to(device, dtype)
    part_lse = 9 * torch.randn(num, tokens, heads, device=device) + 3
    assert_merged(parts, part_lse, dtype)


def test_empty_parts_may_hold_anything(device: str) -> None:
    """Some of them, all but one, all of them."""
    parts, part_lse = torch.randn(5, 3, 2, 64), torch.randn(5, 3, 2)
    part_lse[1:3, 0] = part_lse[1:, 1] = part_lse[:, 2] = -torch.inf
    expected = parts[0, 1].clone()
    parts[part_lse == -torch.inf] = torch.nan
    parts, part_lse = parts.to(device), part_lse.to(device)
    assert_merged(parts, part_lse, torch.float32)
    out, lse = torch.empty(3, 2, 64, device=device), torch.empty(3, 2, device=device)
    merge_attention(parts, part_lse, out, lse)
    torch.testing.assert_close(out[1].cpu(), expected, rtol=2 * EPS, atol=0)
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()


def test_parts_of_attention_are_attention(device: str) -> None:
    """Against softmax over all keys, large logits among them."""
    logits, values = 40 * torch.randn(2, 3, 7, 11), torch.randn(2, 3, 7, 11, 64)  # 7 parts of 11
    parts = torch.einsum("thpk,thpkd->pthd", logits.softmax(-1), values)
    part_lse = logits.logsumexp(-1).permute(2, 0, 1)
    out = torch.empty(2, 3, 64, device=device)
    merge_attention(parts.contiguous().to(device), part_lse.contiguous().to(device), out)
    weights = logits.double().flatten(2).softmax(-1)
    expected = torch.einsum("thk,thkd->thd", weights, values.double().flatten(2, 3))
    # A log-sum-exp of 200 is known to 200 roundings, and so is what it weighs.
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=200 * EPS * 8)


def test_what_is_nan_does_not_hide(device: str) -> None:
    parts, part_lse = torch.randn(2, 2, 1, 64, device=device), torch.zeros(2, 2, 1, device=device)
    part_lse[1, 0] = torch.nan
    out, lse = torch.empty(2, 1, 64, device=device), torch.empty(2, 1, device=device)
    merge_attention(parts, part_lse, out, lse)
    assert out.isnan().all(-1).flatten().tolist() == [True, False]
    assert lse.isnan().flatten().tolist() == [True, False]


def test_what_cannot_be_read_is_refused(device: str) -> None:
    parts, part_lse = torch.zeros(2, 3, 4, 64, device=device), torch.zeros(2, 3, 4, device=device)
    out = torch.empty(3, 4, 64, device=device)
    with pytest.raises(ValueError, match=r"part_lse must be float32 \[2, 3, 4\]"):
        merge_attention(parts, part_lse.double(), out)
    with pytest.raises(ValueError, match=r"parts must be .* contiguous"):
        merge_attention(parts.transpose(0, 1), part_lse, out)
    with pytest.raises(ValueError, match=r"lse must be float32 \[3, 4\]"):
        merge_attention(parts, part_lse, out, part_lse)
