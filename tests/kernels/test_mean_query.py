"""Mean queries are as accurate as plain torch, and a single query is copied to the bit."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.mean_query import mean_query, mean_query_reference
from kvplug.probe.mean import MeanProbe
from kvplug.workspace import Workspace
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.queries import query_windows
from tests.steps import Far, step_of

SHAPES = pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "dtype"),
    [
        (1, 1, 64, torch.float32),
        (2, 3, 80, torch.float32),
        (1, 8, 96, torch.float16),
        (2, 4, 128, torch.bfloat16),
        (1, 4, 256, torch.bfloat16),
    ],
    ids=["g1-d64", "g3-d80", "g8-d96-fp16", "g4-d128-bf16", "g4-d256-bf16"],
)
COUNTS = [33, 0, 1, 256, 7, 1, 0]
"""Tokens of windows: a whole one and parts, single ones, and rows that nobody uses."""


def means_of(
    windows: QueryWindows, kv_heads: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors full of NaN, and counts, for a launch."""
    num, (_, heads, dim) = len(windows.num_tokens), windows.queries.shape
    device = windows.queries.device
    vectors = torch.empty(num, kv_heads, heads // kv_heads, dim, dtype=dtype, device=device)
    return vectors, torch.empty(num, dtype=torch.int32, device=device)


@SHAPES
def test_accuracy(kv_heads: int, group: int, dim: int, dtype: torch.dtype, device: str) -> None:
    windows = query_windows(COUNTS, kv_heads * group, dim, dtype, device)
    (found, counts), (plain, plain_counts), (exact, _) = (
        means_of(windows, kv_heads, kept)
        for kept in (torch.float32, torch.float32, torch.float64)
    )  # fmt: skip
    mean_query(windows, found, counts)
    mean_query_reference(windows, plain, plain_counts)
    mean_query_reference(windows, exact, torch.empty_like(counts))
    assert counts.tolist() == [group * (count > 0) for count in COUNTS]
    assert torch.equal(counts, plain_counts)
    # The sum and the division each round the largest mean once or more.
    assert_accurate(found, plain, exact, 2 * EPS * exact[exact.isfinite()].abs().max().item())
    for s, count in enumerate(COUNTS):
        if not count:
            assert found[s].isnan().all(), "what nobody uses is left alone"
        if count == 1:
            assert torch.equal(found[s], windows.of(s)[0].float().view_as(found[s]))


def test_whole_numbers_are_averaged_exactly(device: str) -> None:
    """Sums of any order are, and divisions are rounded to nearest."""
    windows = query_windows([256, 77], 4, 64, torch.float32, device)
    windows.queries.copy_(torch.randint(-9, 10, windows.queries.shape))
    (found, counts), (plain, _) = means_of(windows, 2), means_of(windows, 2)
    mean_query(windows, found, counts)
    mean_query_reference(windows, plain, torch.empty_like(counts))
    assert torch.equal(found, plain)


def test_a_query_that_is_nan_is_nobody_elses(device: str) -> None:
    windows = query_windows([5, 40, 5], 4, 80, torch.float32, device)
    (found, counts), (expected, _) = means_of(windows, 2), means_of(windows, 2)
    mean_query(windows, expected, counts)
    windows.queries[7, 2, 79] = torch.nan
    mean_query(windows, found, counts)
    assert found[1, 1, 0, 79].isnan()
    found[1, 1, 0, 79] = expected[1, 1, 0, 79]
    assert torch.equal(found, expected)


def test_probes_are_those_of_the_stage_on_cpu(device: str) -> None:
    """To the bit where sums are exact: both round the division to nearest."""
    windows = query_windows([33, 1, 256, 7], 6, 64, torch.float32, device)
    windows.queries.copy_(torch.randint(-9, 10, windows.queries.shape))
    found, counts = means_of(windows, 2)
    mean_query(windows, found, counts)
    step = step_of([Far(0, 0, 9, tokens=tokens) for tokens in windows.num_tokens.tolist()])
    probes = MeanProbe().build(windows.queries.cpu().contiguous(), 2, step, Workspace())
    assert torch.equal(counts.cpu(), probes.counts)
    assert torch.equal(found.cpu(), probes.vectors)


def test_a_step_without_windows_is_none(device: str) -> None:
    windows = query_windows([], 4, 64, torch.float32, device)
    mean_query(windows, *means_of(windows, 2))


def test_what_cannot_be_averaged_is_refused(device: str) -> None:
    windows = query_windows([9], 6, 64, torch.float32, device)
    vectors, counts = means_of(windows, 2)
    with pytest.raises(ValueError, match=r"vectors must be float32 \[1, 2, 3, 64\]"):
        mean_query(windows, vectors[:, :, :2].contiguous(), counts)
    with pytest.raises(ValueError, match="vectors must be float32 "):
        mean_query(windows, vectors.bfloat16(), counts)
    with pytest.raises(ValueError, match=r"counts must be int32 \[1\]"):
        mean_query(windows, vectors, counts.long())
    with pytest.raises(ValueError, match="multiple of KV heads, not 6 of 4"):
        mean_query(windows, torch.empty(1, 4, 1, 64, device=device), counts)
    strided = windows._replace(queries=windows.queries[..., ::2])
    with pytest.raises(ValueError, match="contiguous in the last dimension"):
        mean_query(strided, torch.empty(1, 2, 3, 32, device=device), counts)
