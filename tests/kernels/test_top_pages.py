"""Top pages: selected to the bit as on CPU, in one step or by chunks, and written into the row."""

from __future__ import annotations

import math

import pytest
import torch

from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.top_pages import CHUNK, candidates_shape, top_pages, top_pages_reference
from kvplug.select.top_pages import TopPages
from tests.kernels.contexts import Context, assert_same_rows, contexts_of, untouched_rows
from tests.steps import Far, counts_of, step_of

NAN, INF = math.nan, math.inf
PAGE = 16


def scratch(scores: torch.Tensor, most: int) -> torch.Tensor | None:
    """What chunks need."""
    windows, heads, pages = scores.shape
    shape = candidates_shape(windows, heads, pages, most)
    return torch.empty(shape, dtype=torch.int32, device=scores.device) if shape else None


def chosen(scores: list[float], wanted: int, device: str) -> list[int]:
    """The far pages that one row of scores selects, without sinks or local pages."""
    contexts = contexts_of([Context(0, PAGE * len(scores), 0, len(scores))], PAGE, device)
    rows = untouched_rows(1, wanted, device)
    top_pages(torch.tensor([[scores]], device=device), wanted, contexts, rows)
    assert rows.lengths.tolist() == [wanted * PAGE]
    logical = {page: n for n, page in enumerate(contexts.far.block_table[0].tolist())}
    return [logical[page] for page in rows.table[0].tolist()]


@pytest.mark.parametrize(
    ("scores", "wanted", "expected"),
    [
        pytest.param([3.0], 1, [0], id="one page"),
        pytest.param([1.0, 3.0, 2.0], 2, [1, 2], id="the best, ascending"),
        pytest.param([1.0, 3.0, 2.0], 3, [0, 1, 2], id="all of them"),
        pytest.param([5.0] * 6, 2, [4, 5], id="all equal: the newest"),
        pytest.param([2.0, 7.0, 2.0, 2.0, 1.0], 3, [1, 2, 3], id="ties at the edge: the newest"),
        pytest.param([NAN, 1.0, NAN], 1, [1], id="NaN after a number"),
        pytest.param([NAN, -INF, NAN], 1, [2], id="NaN and infinity alike: the newest"),
        pytest.param([NAN, -3e38, NAN], 2, [1, 2], id="after the least number, the newest NaN"),
        pytest.param([-NAN, 1.0, math.copysign(NAN, -1)], 1, [1], id="negative NaN"),
        pytest.param([INF, 1.0, INF, -INF], 2, [1, 3], id="infinities after a number"),
        pytest.param([-INF] * 4, 3, [1, 2, 3], id="minus infinity only"),
        pytest.param([-2.0, -1.0, -3.0], 1, [1], id="negative"),
        pytest.param([1e-45, 0.0, -1e-45], 1, [0], id="denormal above zero"),
        pytest.param([-1e-45, -1e-44, -2.0], 1, [0], id="denormals below zero"),
        pytest.param([1.0, 1.0000001, 1.0], 1, [1], id="one bit apart"),
        pytest.param([0.0, -0.0, -1.0], 1, [1], id="zero equals minus zero"),
        pytest.param([-0.0, 0.0, -0.0], 2, [1, 2], id="zeros of both signs: the newest"),
    ],
)
def test_choice(scores: list[float], wanted: int, expected: list[int], device: str) -> None:
    assert chosen(scores, wanted, device) == expected


def mixed_scores(heads: int, pages: int, windows: int) -> torch.Tensor:
    """``[S, Hk, N]``: whole numbers that tie, random ones, and no numbers among them."""
    scores = torch.randn(windows, heads, pages)
    scores[:, ::2] = scores[:, ::2].mul(2).round()
    scores[..., ::11] = NAN
    scores[..., 3::17] = -INF
    return scores


@pytest.mark.parametrize(
    ("heads", "page", "pages", "wanted"),
    [(1, 16, 300, 1), (3, 32, 65, 64), (2, 64, 4096, 37), (2, 128, 2049, 0)],
    ids=["best of 300", "all but one", "as many as one program takes", "none"],
)
def test_twin(heads: int, page: int, pages: int, wanted: int, device: str) -> None:
    """Windows of several kinds at once: long, empty, dense, unused, of one far page."""
    windows = [
        Context(0, page * (pages + 9) - 5, 2, pages + 2),
        Context(1, page * 7, 3, 3),
        Context(2, page * 9 - 1),
        Context(1, 0),
        Context(0, page * 12, 4, 5),
    ]
    contexts = contexts_of(windows, page, device)
    scores = mixed_scores(heads, pages, 5).to(device)
    found, expected = (untouched_rows(5 * heads, wanted + 11, device) for _ in range(2))
    top_pages(scores, wanted, contexts, found)
    top_pages_reference(scores, wanted, contexts, expected)
    assert_same_rows(found, expected)
    assert found.lengths[0] == (2 + wanted + 7) * page - 5


@pytest.mark.parametrize("is_counted", [False, True], ids=["constant", "counts"])
def test_chunks(is_counted: bool, device: str) -> None:
    """More pages than one program takes: some chunks have more of the best, some fewer, or none.

    The third window ends in the first chunk, the fourth just behind it.
    """
    pages, most = 2 * CHUNK + 700, 70
    ends = [pages, pages - 3, 500, CHUNK + 1]
    windows = [Context(0, PAGE * (end + 8), 1, 1 + end) for end in ends]
    contexts = contexts_of(windows, PAGE, device)
    scores = mixed_scores(2, pages, 4)
    scores[0, 1, :20] = 9  # ties over chunks, whose oldest are left out
    scores[0, 1, -60:] = 9
    scores[1, 0, 100:200] = 50  # all in one chunk
    scores = scores.to(device)
    counts = torch.tensor([[70, 3], [1, 70], [0, 69], [70, 70]], dtype=torch.int32, device=device)
    wanted: torch.Tensor | int = counts if is_counted else most
    found, expected = (untouched_rows(8, most + 9, device) for _ in range(2))
    top_pages(scores, wanted, contexts, found, scratch(scores, most))
    top_pages_reference(scores, wanted, contexts, expected)
    assert_same_rows(found, expected)


def test_a_row_that_does_not_fit_attends_to_nothing(device: str) -> None:
    contexts = contexts_of([Context(0, PAGE * 30, 2, 25)], PAGE, device)
    rows = untouched_rows(1, 10, device)
    before = rows.table.clone()
    top_pages(torch.randn(1, 1, 23, device=device), 4, contexts, rows)
    assert rows.lengths.tolist() == [0]
    assert torch.equal(rows.table, before)


def test_pages_are_those_of_the_stage_on_cpu(device: str) -> None:
    wanted = 13
    contexts = contexts_of([Context(0, PAGE * 203, 3, 203)], PAGE, device)
    scores = mixed_scores(4, 200, 1)
    rows = untouched_rows(4, 16, device)
    top_pages(scores.to(device), wanted, contexts, rows)
    step = step_of([Far(0, 3, 203, wanted)])
    selected = torch.empty(1, 4, wanted, dtype=torch.int32)
    TopPages().select(scores.clone(), step, counts_of(step, 4), selected)
    pages = contexts.far.block_table[0].cpu()
    assert torch.equal(rows.table[:, 3:].cpu(), pages[selected[0].long()])


def test_what_cannot_be_read_is_refused(device: str) -> None:
    contexts = contexts_of([Context(0, PAGE * 30, 2, 25)], PAGE, device)
    rows, scores = untouched_rows(2, 20, device), torch.zeros(1, 2, 23, device=device)
    with pytest.raises(ValueError, match=r"scores must be float32 \[S, Hk, N\]"):
        top_pages(scores.bfloat16(), 4, contexts, rows)
    with pytest.raises(ValueError, match=r"wanted must be int32 \[1, 2\]"):
        top_pages(scores, torch.zeros(1, 2, device=device), contexts, rows)
    with pytest.raises(ValueError, match=r"lengths must be int32 \[2\]"):
        top_pages(scores, 4, contexts, PageRows(rows.table, rows.lengths[:1]))
    long = torch.zeros(1, 2, CHUNK + 1, device=device)
    with pytest.raises(ValueError, match=f"More than {CHUNK} far pages need candidates"):
        top_pages(long, 4, contexts, rows)
    with pytest.raises(ValueError, match="3 places for 4 pages"):
        top_pages(long, 4, contexts, rows, scratch(long, 3))
