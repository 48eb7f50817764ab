"""What each request of a mixed batch is told that it attended to stands in the page table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numba
import numpy as np
import pytest

from kvplug.row_counts import FIELDS, RowCounts
from tests.cases import PolicyCase
from tests.made_up import Piece, World

PAGE = 8
OPTIONS = {"sink": 10, "local": 20, "budget": 46, "window": 16, "dense_below": 100}
MIXED = [
    Piece(1, 256, 64, True),  # whole windows in the middle of a prompt
    Piece(2, 480, 37, True),  # the end of a prompt, inside a page
    Piece(3, 333, 1, False),
    Piece(4, 700, 11, False),  # tokens replayed after a preemption
    Piece(5, 0, 48, True),  # too short to be sparse
    Piece(6, 70, 1, False),  # the same, decoding
    Piece(7, 32, 160, True),  # becomes sparse half way
]
CASES = [
    PolicyCase("streaming", {}),
    PolicyCase("quest", {}),
    PolicyCase("actqkv", {}),
    PolicyCase("quest", {"budget": {"name": "top_p", "p": 0.5, "temperature": 0.2}}),
    PolicyCase("channels", {"budget": {"name": "recall", "target": 0.6, "every": 3}}),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waiting for a second thread takes longer than these small steps."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(threads)


def expected(piece: Piece, attended: dict[tuple[int, int], Any]) -> list[int]:
    """Counts of one request, from the pages that the page table names, window by window."""
    windows = {}
    tokens = 0
    for position in range(piece.start, piece.stop):
        found = attended[piece.request, position]
        if found is not None:
            windows[found.first] = found
            tokens += 1
    pages = sum(len(head) for window in windows.values() for head in window.pages)
    available = sum(-(-window.end // PAGE) * len(window.pages) for window in windows.values())
    return [tokens, len(windows), pages, available]


@pytest.mark.parametrize("asked", [{}, {1: 2, 4: 9}], ids=["same", "own"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_each_request_is_told_its_own(case: PolicyCase, asked: dict[int, int]) -> None:
    made = World(case, OPTIONS, PAGE, asked={} if case.name == "streaming" else asked)
    for piece in MIXED:
        made.prefill(piece.request, piece.start)
    before = asdict(made.pipeline.counts)
    made.counts = RowCounts(len(MIXED))
    attended = made.run(MIXED, cached=False)
    assert made.counts.table.tolist() == [expected(piece, attended) for piece in MIXED]
    after = asdict(made.pipeline.counts)
    together = made.counts.table.sum(0).tolist()
    assert together == [after[field] - before[field] for field in FIELDS]
    assert made.counts.table[MIXED.index(MIXED[3]), FIELDS.index("sparse_windows")] == 11
    assert not made.counts.table[4:6].any(), "dense requests have no sparse windows"


def test_a_dense_step_counts_nothing() -> None:
    made = World(CASES[1], OPTIONS, PAGE)
    made.counts = RowCounts(1)
    made.run([Piece(1, 0, 64, True)])
    assert not made.counts.table.any()


def test_long_contexts_do_not_overflow() -> None:
    """A million tokens in pages of 16, over 64 layers of 8 heads, for a window of each kind."""
    from kvplug.windows import Windows

    n = 4096
    ones = np.ones(n, np.int32)
    windows = Windows(
        0 * ones, np.arange(n, dtype=np.int32), ones, ones * 2**20, ones, ones * (2**16 - 32),
        ones * 128, np.ones(n, np.bool_),
    )  # fmt: skip
    counts = RowCounts(1)
    counts.add(windows, 16, 512, varies=False)
    assert counts.table[0].tolist() == [n, n, n * 512 * (1 + 128 + 32), n * 512 * 2**16]
