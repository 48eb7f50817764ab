"""What probes ask of channel codes: kernel, twin and the index on CPU agree to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.index.channels import PLANES, _weigh
from kvplug.index.shares import LOG2_E
from kvplug.kernels.channel_probes import channel_probes, channel_probes_reference
from tests.kernels.channels import Channels, some_channels
from tests.kernels.far import Windows, windows_of
from tests.steps import Far

Asked = tuple[torch.Tensor, torch.Tensor]
SCALE = 0.125


def some_windows(probes: int, device: str) -> Windows:
    """Of two requests, one unused, one with fewer probes."""
    far = [Far(1, 2, 20), Far(0, 0, 9), Far(0, 5, 9), Far(1, 1, 34)]
    return windows_of(far, [probes, 0, probes, max(probes - 1, 1)], device)


def unwritten(vectors: torch.Tensor, channels: int) -> Asked:
    shape, device = vectors.shape[:3], vectors.device
    asked = torch.zeros(*shape, channels // 32, PLANES + 1, dtype=torch.int64, device=device)
    return asked, torch.zeros(shape, device=device)


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize(
    ("heads", "probes", "dim", "dtype"),
    [
        (1, 1, 64, torch.float32),
        (2, 3, 80, torch.float32),
        (2, 8, 96, torch.float16),
        (1, 4, 128, torch.bfloat16),
        (1, 24, 256, torch.float32),
    ],
    ids=["g1-d64", "g3-d80", "g8-d96-fp16", "g4-d128-bf16", "24-d256"],
)
def test_twins(
    heads: int, probes: int, dim: int, dtype: torch.dtype, channels: int, device: str
) -> None:
    windows, made = some_windows(probes, device), some_channels(heads, dim, channels, device)
    vectors = torch.randn(4, heads, probes, dim).to(device, dtype)
    found, expected = unwritten(vectors, channels), unwritten(vectors, channels)
    given = vectors, windows.counts, windows.far, *made, SCALE
    channel_probes(*given, *found)
    channel_probes_reference(*given, *expected)
    assert all(map(torch.equal, found, expected))
    assert_as_on_cpu(found, vectors, windows, made)


def assert_as_on_cpu(found: Asked, vectors: torch.Tensor, windows: Windows, made: Channels) -> None:
    """The function that the index on CPU weighs with gives the same."""
    used = windows.counts.cpu() > 0
    asked, units = (tensor.cpu()[used].contiguous() for tensor in found)
    expected, sizes = torch.zeros_like(asked), torch.zeros_like(units)
    mine, counts = vectors.float().cpu()[used].contiguous(), windows.counts.cpu()[used]
    step = windows.step
    _weigh(
        1, mine.numpy(), counts.numpy(), step.sparse_windows, step.windows.request,
        step.block_table_host, made.chosen.cpu().numpy(), made.scales.cpu().numpy(),
        np.float32(SCALE) * LOG2_E, expected.numpy().view(np.uint64), sizes.numpy(),
    )  # fmt: skip
    assert torch.equal(asked, expected)
    assert torch.equal(units, sizes)


def test_half_of_the_largest_weight_is_rounded_down(device: str) -> None:
    """3.5 sevenths: to 3, whatever the last bit of the division says."""
    windows = windows_of([Far(0, 0, 9)], [1], device)
    made = some_channels(1, 64, 64, device)
    made.scales[:, :, 1] = 1
    vectors = torch.full((1, 1, 1, 64), 3.0, device=device)
    asked, units = unwritten(vectors, 64)
    channel_probes(vectors, windows.counts, windows.far, *made, 1.0, asked, units)
    assert asked[0, 0, 0].tolist() == [[-1, -1, -1, -1], [-1, -1, -1, 0]]
    assert units.item() == pytest.approx(3 / 7 / np.log(2), rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_probe_that_is_not_finite_asks_for_nothing(bad: float, device: str) -> None:
    windows, made = some_windows(3, device), some_channels(2, 64, 32, device)
    vectors = torch.randn(4, 2, 3, 64, device=device)
    vectors[0, 1, 2] = bad
    vectors[2, 0, 0, :63] = 0
    vectors[2, 0, 0, 63] = bad  # in one channel, which not every head has chosen
    found, expected = unwritten(vectors, 32), unwritten(vectors, 32)
    given = vectors, windows.counts, windows.far, *made, SCALE
    channel_probes(*given, *found)
    channel_probes_reference(*given, *expected)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    assert not found[0][0, 1, 2, :, 1:].any()
    assert not found[1][0, 1, 2].isfinite()


def test_an_unused_row_is_not_looked_at(device: str) -> None:
    windows, made = some_windows(2, device), some_channels(1, 64, 64, device)
    windows.far.request[1] = 2**30
    vectors = torch.randn(4, 1, 2, 64, device=device)
    asked, units = unwritten(vectors, 64)
    channel_probes(vectors, windows.counts, windows.far, *made, SCALE, asked, units)
    assert not units[1].any()
    assert not asked[1].any()


def test_what_cannot_be_asked_is_refused(device: str) -> None:
    windows, made = some_windows(2, device), some_channels(1, 64, 64, device)
    vectors = torch.randn(4, 1, 2, 64, device=device)
    asked, units = unwritten(vectors, 64)
    with pytest.raises(ValueError, match=r"asked must be int64 \[4, 1, 2, 2, 4\]"):
        channel_probes(vectors, windows.counts, windows.far, *made, 1.0, asked[..., :3], units)
    with pytest.raises(ValueError, match=r"units must be float32 \[4, 1, 2\]"):
        channel_probes(vectors, windows.counts, windows.far, *made, 1.0, asked, units.double())
