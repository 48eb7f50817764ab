"""Statistics of queries: those of all queries of the prompt, wherever its windows are cut."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.activation import Seen
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.query_statistics import (
    Carried,
    query_statistics,
    query_statistics_reference,
)
from kvplug.probe.query_statistics import pooled_reference
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.queries import carried_by, logical_pages, query_windows

SHAPES = pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [
        (1, 64, torch.float32),
        (3, 80, torch.float32),
        (4, 128, torch.bfloat16),
        (2, 96, torch.float16),
        (8, 256, torch.bfloat16),
    ],
    ids=["d64", "d80", "d128-bf16", "d96-fp16", "d256-bf16"],
)
NUM_PAGES = 9


def empty_state(heads: int, dim: int, page: list[int], device: str) -> Seen:
    """Before its first page lies another, which is nobody's."""
    means, variances = torch.empty(2, NUM_PAGES + 1, heads, dim, device=device)[:, 1:]
    counts = torch.empty(NUM_PAGES + 1, heads, device=device)[1:]
    return Seen(*carried_by(page, NUM_PAGES, device), means, variances, counts)


def carried_of(prefills: list[bool], here: list[int], also: list[int], device: str) -> Carried:
    flags = torch.tensor(prefills, dtype=torch.int32, device=device)
    return Carried(flags, *(logical_pages(pages, NUM_PAGES, device) for pages in (here, also)))


def watch(windows: QueryWindows, seen: Seen, carried: Carried) -> None:
    _, heads, dim = windows.queries.shape
    shape = len(windows.num_tokens), heads, 2, dim
    # Moments of an earlier step, which a decoded token must not take for its own.
    moments = torch.full(shape, 7.0, device=windows.queries.device)
    query_statistics(windows, seen, carried, moments)


@SHAPES
def test_accuracy(heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """One window, three and a decoded token that hands them on, and one that leaves nothing."""
    windows = query_windows([40, 33, 1, 20, 1, 0], heads, dim, dtype, device)
    prefills = [True, True, True, True, False, True]
    carried = carried_of(prefills, [5, 2, 0, 3, 8, -1], [5, 2, 7, 3, 6, -1], device)
    before = [-1, -1, 2, 7, 3, -1]
    found = empty_state(heads, dim, before, device)
    watch(windows, found, carried)
    plain, exact = (empty_state(heads, dim, before, device) for _ in range(2))
    exact = Seen(*exact[:3], *(x.double() for x in exact[3:]))
    for state in (plain, exact):
        query_statistics_reference(windows, state, carried, torch.empty(0))
    largest = windows.queries.float().abs().max().item() ** 2
    # A mean is rounded a few times, a variance is a mean of squares.
    for mine, theirs, truth in zip(found[3:5], plain[3:5], exact[3:5], strict=True):
        written = [5, 2, 0, 7, 3, 8, 6]
        assert_accurate(mine[written], theirs[written], truth[written], 4 * EPS * largest)
        assert mine[[1, 4]].isnan().all(), "no window left anything here"
    before_the_first = found.counts.as_strided((heads,), (1,), 0)
    assert before_the_first.isnan().all(), "a window that writes nothing wrote to page -1"
    assert torch.equal(found.counts[[5, 2, 0, 7, 3, 8, 6], 0].cpu(),
                       torch.tensor([40.0, 33, 34, 34, 54, 54, 54]))  # fmt: skip


def test_a_request_that_begins_with_pages_of_the_step_itself(device: str) -> None:
    """vLLM hands out blocks that the same step fills: its windows go on from the filler's."""
    windows = query_windows([16, 16, 16, 16], 2, 64, torch.float32, device)
    prefills, here = [True] * 4, [0, 1, 2, 3]
    seen = empty_state(2, 64, [-1, 0, 1, 0], device)
    watch(windows, seen, carried_of(prefills, here, here, device))
    assert seen.counts[:4, 0].tolist() == [16, 32, 48, 32]
    both = torch.cat([windows.of(0), windows.of(3)]).double()
    assert (seen.means[3].cpu() - both.mean(0).cpu()).abs().max() <= 64 * EPS


def test_they_are_those_of_the_whole_prompt(device: str) -> None:
    """And those of the twin on CPU, which the paper's update gives."""
    windows = query_windows([16, 16, 16, 5], 3, 64, torch.float32, device)
    windows.queries.add_(3)  # a mean that is not small beside the spread
    carried = carried_of([True] * 4, [0, 1, 2, 3], [0, 1, 2, 3], device)
    seen = empty_state(3, 64, [-1, 0, 1, 2], device)
    watch(windows, seen, carried)
    every = torch.cat([windows.of(s) for s in range(4)]).double()
    cut = [windows.of(s).cpu() for s in range(4)]
    mean, variance, count = pooled_reference(cut)
    torch.testing.assert_close(every.mean(0).cpu(), mean)
    torch.testing.assert_close(every.var(0).cpu(), variance)
    # Squares up to 144 are added up; their sum is known within a few roundings.
    assert (seen.means[3].cpu() - mean).abs().max() <= 16 * EPS * 12
    assert (seen.variances[3].cpu() - variance).abs().max() <= 16 * EPS * 144
    assert (seen.counts[3] == count).all()


# The interpreter warns of infinity less infinity, and of a square that is infinite.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=["nan", "infinite", "huge"])
def test_a_head_sits_out_a_window_that_is_no_number(value: float, device: str) -> None:
    windows = query_windows([16, 16], 2, 64, torch.float32, device)
    windows.queries[20, 1, 5] = value
    carried = carried_of([True, True], [0, 1], [0, 1], device)
    seen = empty_state(2, 64, [-1, 0], device)
    watch(windows, seen, carried)
    assert seen.counts[1].tolist() == [32, 16]
    assert torch.equal(seen.means[1, 1], seen.means[0, 1])
    assert torch.equal(seen.variances[1, 1], seen.variances[0, 1])
    assert not torch.equal(seen.means[1, 0], seen.means[0, 0])


def test_one_query_has_no_variance(device: str) -> None:
    windows = query_windows([1], 2, 64, torch.float32, device)
    seen = empty_state(2, 64, [-1], device)
    watch(windows, seen, carried_of([True], [4], [4], device))
    assert torch.equal(seen.means[4], windows.queries[0])
    assert (seen.variances[4] == 0).all()


def test_what_cannot_be_written_is_refused(device: str) -> None:
    windows = query_windows([9], 2, 64, torch.float32, device)
    seen = empty_state(2, 64, [-1], device)
    carried = carried_of([True], [0], [0], device)
    moments = torch.empty(1, 2, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"moments must be float32 \[1, 2, 2, 64\]"):
        query_statistics(windows, seen, carried, moments[:, :, :1])
    with pytest.raises(ValueError, match=r"carried.here must be int32 \[1\]"):
        query_statistics(windows, seen, carried._replace(here=seen.before.long()), moments)
