"""Channels of a context: those that vary most, told apart to the bit where sums are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.index.channels import Channels, ChannelsIndex
from kvplug.kernels.channel_choice import channel_choice, channel_choice_reference
from kvplug.stage import Layer
from kvplug.step import Sealing
from tests.caches import KeyCache
from tests.kernels.accuracy import EPS
from tests.made_up import layer_shape
from tests.steps import Far, step_of

SHAPES = pytest.mark.parametrize(
    ("tokens", "heads", "dim", "channels", "dtype"),
    [
        (16, 1, 64, 32, torch.float32),
        (64, 3, 80, 64, torch.float32),
        (32, 2, 96, 32, torch.float16),
        (256, 2, 128, 64, torch.bfloat16),
        (16, 1, 256, 64, torch.float16),
    ],
    ids=["n16-d64", "n64-d80", "n32-d96-fp16", "n256-d128-bf16", "n16-d256-fp16"],
)
PLACES = [4, -1, 0]
"""Pages at which three contexts begin; one is padding."""
Stored = tuple[torch.Tensor, torch.Tensor]


def whole_keys(tokens: int, heads: int, dim: int) -> torch.Tensor:
    """``[3, n, Hk, D]`` whole numbers whose mean is one too, so that no sum rounds.

    Every other key is the one before mirrored at the mean. Channels differ in how far they reach.
    """
    reach = torch.randint(1, 9, (3, 1, heads, dim))
    centre = torch.randint(-4, 5, (3, 1, heads, dim))
    half = (torch.rand(3, tokens // 2, heads, dim) * (2 * reach + 1)).floor() - reach
    return torch.cat([centre + half, centre - half], 1).float()


def unwritten(heads: int, channels: int, device: str) -> Stored:
    chosen = torch.zeros(6, heads, channels, dtype=torch.int16, device=device)
    return chosen, torch.zeros(6, heads, 2, channels, device=device)


@SHAPES
def test_twin(
    tokens: int, heads: int, dim: int, channels: int, dtype: torch.dtype, device: str
) -> None:
    """To the bit, ties too: of equal channels, and every one ties with its partner, the first."""
    keys = whole_keys(tokens, heads, dim).to(device, dtype)
    strided = torch.nn.functional.pad(keys, (0, 8, 0, 1))[..., :heads, :dim]
    integer = torch.int32 if dim == 80 else torch.int64
    places = torch.tensor(PLACES, dtype=integer, device=device)
    found, expected = unwritten(heads, channels, device), unwritten(heads, channels, device)
    channel_choice(strided, places, *found)
    channel_choice_reference(keys, places, *expected)
    assert all(map(torch.equal, found, expected))
    assert not found[1][[1, 2, 3, 5]].any()


def test_any_keys(device: str) -> None:
    """The best channels, in order, as far as float32 tells their variances apart."""
    strength = torch.rand(2, 128) ** 3 + 0.05
    keys = (torch.randn(1, 200, 2, 128) * strength + 3).to(device)
    chosen, scales = unwritten(2, 64, device)
    channel_choice(keys, torch.tensor([2], device=device), chosen, scales)
    exact = keys[0].double()
    variance = exact.var(0, unbiased=False)  # [Hk, D]
    rank = variance + variance.roll(64, 1)
    mine = chosen[2].long()
    assert (mine.sort(1).values.diff(dim=1) > 0).all()  # each once
    slack = 1e-4 * rank.amax()
    assert (rank.gather(1, mine).diff(dim=1) <= slack).all()
    left_out = rank.scatter(1, mine, -1.0).amax(1)
    assert (rank.gather(1, mine)[:, -1] >= left_out - slack).all()
    mean, deviation = scales[2].double().unbind(1)
    assert (mean - exact.mean(0).gather(1, mine)).abs().max() <= 200 * EPS * exact.abs().max()
    assert torch.allclose(deviation, variance.gather(1, mine).sqrt(), rtol=1e-4)


@pytest.mark.parametrize("bits", [64, 128])
def test_the_index_on_cpu_chooses_the_same(bits: int, device: str) -> None:
    shape = layer_shape(num_pages=7, page=16, head_dim=64, window=64, local=70)
    cache = KeyCache(shape)
    index = ChannelsIndex(Channels(bits), Layer(shape, {}, cache.reader()))
    assert index.first_pages == 4
    keys = whole_keys(64, 3, 64)[:1]
    pages = torch.tensor([[5, 2, 6, 1, 0]], dtype=torch.int32)
    slots = (pages[0, :4, None].long() * 16 + torch.arange(16)).flatten()
    cache.write(keys[0], slots)
    nothing = np.empty(0, np.int32)
    sealed = Sealing(nothing, nothing, np.zeros(2, np.int32), np.zeros(1, np.int32))
    index.begin(sealed, step_of([Far(0, 0, 4)], pages), cache.workspace)
    chosen, scales = (torch.zeros_like(t).to(device) for t in index.state[1:])
    channel_choice(keys.to(device), pages[:, 0].to(device), chosen, scales)
    assert torch.equal(chosen.cpu(), index.state[1])
    assert torch.equal(scales.cpu(), index.state[2])


def test_what_is_no_number_comes_first(device: str) -> None:
    """As for the sorting of the twin: NaN, then infinity, and no channel twice."""
    keys = whole_keys(16, 1, 64)[:1].to(device)
    keys[0, 3, 0, 50] = torch.nan
    keys[0, 5, 0, 7] = torch.inf
    keys[0, ::2, 0, 20] = 1e30  # its square is beyond float32
    found, expected = unwritten(1, 32, device), unwritten(1, 32, device)
    places = torch.tensor([1], device=device)
    channel_choice(keys, places, *found)
    channel_choice_reference(keys, places, *expected)
    assert torch.equal(found[0], expected[0])
    assert found[0][1, 0, :6].tolist() == [7, 18, 39, 50, 20, 52]
    assert torch.equal(found[1].isnan(), expected[1].isnan())


def test_what_cannot_be_chosen_is_refused(device: str) -> None:
    keys, places = torch.zeros(1, 16, 1, 64, device=device), torch.zeros(1, device=device).int()
    chosen, scales = unwritten(1, 32, device)
    with pytest.raises(ValueError, match="at least one key"):
        channel_choice(keys[:, :0], places, chosen, scales)
    with pytest.raises(ValueError, match=r"Channels must be one of \(32, 64\), not 16"):
        channel_choice(keys, places, chosen[..., :16].contiguous(), scales)
    with pytest.raises(ValueError, match=r"scales must be float32 \[6, 1, 2, 32\]"):
        channel_choice(keys, places, chosen, scales.double())
    with pytest.raises(ValueError, match="Head size must be one of"):
        channel_choice(torch.zeros(1, 16, 1, 48, device=device), places, chosen, scales)
