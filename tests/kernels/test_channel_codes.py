"""Channel codes: comparisons decide every bit, so kernel and twins agree to the bit."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.channels import Channels, ChannelsIndex
from kvplug.kernels.channel_codes import channel_codes, channel_codes_reference
from kvplug.stage import Layer
from tests.caches import KeyCache, fill
from tests.kernels.channels import some_channels
from tests.kernels.far import NUM_PAGES
from tests.made_up import layer_shape


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "page", "dtype"),
    [
        (1, 1, 64, 16, torch.bfloat16),
        (33, 3, 80, 32, torch.float32),
        (40, 2, 96, 64, torch.float16),
        (31, 2, 128, 128, torch.bfloat16),
        (64, 1, 256, 32, torch.float16),
    ],
    ids=["one", "p32-d80", "p64-d96-fp16", "p128-d128-bf16", "p32-d256-fp16"],
)
def test_twin(
    tokens: int, heads: int, dim: int, page: int, dtype: torch.dtype, channels: int, device: str
) -> None:
    """Padding and contexts without channels are left out; nothing else is touched."""
    made = some_channels(heads, dim, channels, device)
    keys = torch.randn(tokens, heads + 2, dim) * 1.5
    strided = keys.to(device, dtype)[:, 1 : heads + 1]
    slots = torch.randperm(NUM_PAGES * page)[:tokens].to(device)
    firsts = torch.randint(0, NUM_PAGES, (tokens,), dtype=torch.int32, device=device)
    slots[2::5] = -1
    firsts[3::7] = -1
    codes = torch.empty(NUM_PAGES, heads, channels // 32, page, dtype=torch.int64, device=device)
    expected = codes.clone()
    channel_codes(strided, slots, firsts, *made, codes)
    channel_codes_reference(strided, slots, firsts, *made, expected)
    assert torch.equal(codes, expected)
    written = ((slots >= 0) & (firsts >= 0)).sum()
    unused = torch.empty(1, dtype=torch.int64, device=device)
    assert (codes != unused).any(2).all(1).sum() == written


@pytest.mark.parametrize("bits", [64, 128])
def test_codes_are_those_of_the_index_on_cpu(bits: int, device: str) -> None:
    """Of two pages that a context filled; the channels are the index's own."""
    shape = layer_shape(num_pages=9, page=16, head_dim=80, window=32, local=48)
    index = ChannelsIndex(Channels(bits), Layer(shape, {}, KeyCache(shape).reader()))
    pages = torch.tensor([7, 3, 0, 5], dtype=torch.int32)
    keys = torch.randn(64, 3, 80)
    fill(index, keys, pages)
    slots = (pages.long()[:, None] * 16 + torch.arange(16)).flatten()
    codes, chosen, scales = (tensor.to(device) for tensor in index.state)
    found = torch.zeros_like(codes)
    firsts = torch.full((64,), 7, dtype=torch.int32, device=device)
    channel_codes(keys.to(device), slots.to(device), firsts, chosen, scales, found)
    assert torch.equal(found, codes)


def test_edges_of_the_four_codes(device: str) -> None:
    """Mean 1, deviation 2: a deviation of 0 is not positive, one of exactly 2 is not extreme."""
    values = torch.tensor([4.0, 3.0, 1.5, 1.0, 0.5, -1.0, -2.0, torch.inf, -torch.inf, torch.nan])
    keys = torch.zeros(1, 1, 64, device=device)
    keys[0, 0, :10] = values.to(device)
    chosen = torch.arange(64, dtype=torch.int16, device=device)[None, None]
    scales = torch.tensor([1.0, 2.0], device=device)[:, None].repeat(1, 64)[None, None]
    codes = torch.zeros(1, 1, 2, 16, dtype=torch.int64, device=device)
    first = torch.zeros(1, dtype=torch.int32, device=device)
    channel_codes(keys, first.long(), first, chosen, scales.contiguous(), codes)
    low, high = ([int(w) >> c & 1 for c in range(10)] for w in codes[0, 0, :, 0].cpu())
    assert low == [1, 1, 1, 0, 0, 0, 0, 1, 0, 0]
    # Of NaN neither is known to be so, and "neither" is agreement.
    assert high == [1, 0, 0, 1, 1, 1, 0, 1, 0, 1]


def test_what_cannot_be_written_is_refused(device: str) -> None:
    made = some_channels(2, 64, 64, device)
    keys, slots = torch.zeros(3, 2, 64, device=device), torch.zeros(3, device=device).long()
    codes = torch.zeros(NUM_PAGES, 2, 2, 16, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"firsts must be int32 \[3\]"):
        channel_codes(keys, slots, slots, *made, codes)
    with pytest.raises(ValueError, match=r"codes must be int64 \[pages, 2, 2, P\]"):
        channel_codes(keys, slots, slots.int(), *made, codes[:, :, :1].contiguous())
    with pytest.raises(ValueError, match="Page size must be one of"):
        channel_codes(keys, slots, slots.int(), *made, codes[..., :8].contiguous())
