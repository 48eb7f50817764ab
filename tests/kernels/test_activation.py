"""Weighted mean queries: as accurate as plain torch, and what weighs nothing leaves no trace."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.activation import Seen, activation_means, activation_means_reference
from kvplug.kernels.distance import QueryWindows
from kvplug.probe.activation import activation_reference
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.queries import carried_by, query_windows

SHAPES = pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "dtype"),
    [
        (1, 1, 64, torch.float32),
        (2, 3, 80, torch.float32),
        (2, 4, 128, torch.bfloat16),
        (1, 8, 96, torch.float16),
        (1, 4, 256, torch.bfloat16),
    ],
    ids=["g1-d64", "g3-d80", "g4-d128-bf16", "g8-d96-fp16", "g4-d256-bf16"],
)
COUNTS = [33, 0, 1, 20, 40, 5]
PAGE = [3, 0, 2, -1, 0, 1]
"""Where windows find their statistics; one begins its request, page 1 is not warm."""
LONGEST, WARM_UP = 40, 16


def seen_of(heads: int, dim: int, device: str, page: list[int]) -> Seen:
    counts = torch.full((4, heads), 64.0)
    counts[0] = WARM_UP
    counts[1] = WARM_UP - 1
    counts[3, 0] = 0  # one head sits out
    return Seen(
        *carried_by(page, 4, device),
        torch.randn(4, heads, dim).to(device),
        torch.rand(4, heads, dim).to(device) * 3,
        counts.to(device),
    )


def means_of(
    windows: QueryWindows, seen: Seen, kv_heads: int, shares: int, sharpness: float
) -> list[torch.Tensor]:
    """``[S, Hk, G, D]`` by the kernel, in float32 and in float64; others are -7."""
    num, (_, heads, dim) = len(windows.num_tokens), windows.queries.shape
    device = windows.queries.device
    results = []
    for launch, dtype in (
        (activation_means, torch.float32),
        (activation_means_reference, torch.float32),
        (activation_means_reference, torch.float64),
    ):
        distances = torch.empty(num, heads, LONGEST, device=device)
        weights = torch.empty(num, shares, LONGEST, device=device)
        shape = num, kv_heads, heads // kv_heads, dim
        vectors = torch.full(shape, -7, dtype=dtype, device=device)
        launch(windows, seen, WARM_UP, sharpness, distances, weights, vectors)
        results.append(vectors)
    return results


@SHAPES
@pytest.mark.parametrize("share", ["all", "each"])
def test_accuracy(
    kv_heads: int, group: int, dim: int, dtype: torch.dtype, share: str, device: str
) -> None:
    windows = query_windows(COUNTS, kv_heads * group, dim, dtype, device)
    seen = seen_of(kv_heads * group, dim, device, PAGE)
    shares = 1 if share == "all" else kv_heads
    found, plain, exact = means_of(windows, seen, kv_heads, shares, 1.0)
    # A weight is rounded a few times, and so is what it weighs.
    assert_accurate(found, plain, exact, 8 * EPS * windows.queries.abs().max().item())
    assert (found[1] == -7).all()


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("shares", [1, 2])
def test_twin_on_cpu(sharpness: float, shares: int, device: str) -> None:
    """The paper's formula, as the stage on CPU is tested by.

    ``x ** sharpness`` by powers of 2 is off by ``sharpness * |log2 x|`` roundings, and x is at
    least 2^-4 here.
    """
    windows = query_windows([33], 6, 64, torch.float32, device)
    seen = seen_of(6, 64, device, [0])
    found, _, _ = means_of(windows, seen, 2, shares, sharpness)
    expected = activation_reference(
        windows.of(0).cpu(), seen.means[0].cpu(), seen.variances[0].cpu(), sharpness, shares
    )
    largest = windows.queries.abs().max().item()
    allowed = (64 + 16 * sharpness) * EPS * largest
    assert (found[0].flatten(0, 1).cpu() - expected).abs().max() <= allowed


def test_a_single_query_is_its_own(device: str) -> None:
    windows = query_windows([1, 1], 6, 64, torch.bfloat16, device)
    found, _, _ = means_of(windows, seen_of(6, 64, device, [0, -1]), 2, 1, 1.0)
    assert torch.equal(found.flatten(1, 2), windows.queries.float())


# The interpreter warns of infinity times 0, as there is in a token that weighs nothing.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "infinite"])
def test_a_query_that_is_no_number_weighs_nothing(value: float, device: str) -> None:
    windows = query_windows([9], 2, 64, torch.float32, device)
    seen = seen_of(2, 64, device, [0])
    found, _, _ = means_of(windows, seen, 1, 1, 1.0)
    windows.queries[4, 1, 60] = value
    marked, _, exact = means_of(windows, seen, 1, 1, 1.0)
    assert marked.isfinite().all()
    assert not torch.equal(marked, found)
    assert (marked.double() - exact).abs().max() <= 64 * EPS * 10


def test_a_sharpness_of_0_gives_the_mean_query(device: str) -> None:
    """A token on the mean of all before it, with a bias of 0, counts like any other."""
    windows = query_windows([9], 1, 64, torch.float32, device)
    seen = seen_of(1, 64, device, [0])
    windows.queries[3] = seen.means[0]
    found, _, _ = means_of(windows, seen, 1, 1, 0.0)
    mean = windows.of(0).double().mean(0)
    assert (found[0, 0] - mean).abs().max() <= 16 * EPS * windows.queries.abs().max()


def test_a_head_that_is_not_warm_has_no_say(device: str) -> None:
    """Nor has a NaN of its queries in what the others weigh; its own mean is NaN."""
    windows = query_windows([9], 2, 64, torch.float32, device)
    seen = seen_of(2, 64, device, [3])
    found, _, _ = means_of(windows, seen, 1, 1, 1.0)
    windows.queries[4, 0, 7] = torch.nan
    marked, _, _ = means_of(windows, seen, 1, 1, 1.0)
    assert torch.equal(marked[0, 0, 1], found[0, 0, 1])
    assert marked[0, 0, 0, 7].isnan()


def test_before_the_warm_up_all_weigh_alike(device: str) -> None:
    windows = query_windows([9, 9], 2, 64, torch.float32, device)
    found, _, _ = means_of(windows, seen_of(2, 64, device, [-1, 1]), 1, 1, 1.0)
    for s in range(2):
        mean = windows.of(s).double().mean(0)
        assert (found[s, 0] - mean).abs().max() <= 16 * EPS * windows.queries.abs().max()


def test_what_cannot_be_weighed_is_refused(device: str) -> None:
    windows = query_windows([9], 6, 64, torch.float32, device)
    seen = seen_of(6, 64, device, [0])
    distances, vectors = torch.empty(1, 6, 9), torch.empty(1, 2, 3, 64)
    weights = torch.empty(1, 1, 9)
    given = distances.to(device), weights.to(device), vectors.to(device)
    with pytest.raises(ValueError, match="Sharpness must be from 0 to 100, not 101"):
        activation_means(windows, seen, 1, 101, *given)
    wrong = given[0], torch.empty(1, 3, 9, device=device), given[2]
    with pytest.raises(ValueError, match="Shares must be 1 or 2, not 3"):
        activation_means(windows, seen, 1, 1.0, *wrong)
    with pytest.raises(ValueError, match=r"distances must be float32 \[1, 6, 9\]"):
        activation_means(windows, seen, 1, 1.0, given[0][:, :5], *given[1:])
    with pytest.raises(ValueError, match=r"seen.counts must be float32 \[4, 6\]"):
        activation_means(windows, seen._replace(counts=seen.means), 1, 1.0, *given)
