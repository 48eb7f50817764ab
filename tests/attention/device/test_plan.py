"""Plans of steps on a GPU, from lengths alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.attention.device.plan import DevicePlan, Lengths, make_plan
from kvplug.attention.device.send import send_columns
from kvplug.pages import PageGeometry
from kvplug.windows import cut_windows
from tests.made_up import Piece

GEOMETRY = PageGeometry(
    page=16, window=32, sink_pages=1, local=32, budget_pages=2, dense_below=64, most_pages=2
)
MIXED = [
    Piece(0, 128, 37, True), Piece(1, 40, 1, False), Piece(2, 32, 70, True), Piece(3, 201, 1, False)
]  # fmt: skip


def lengths_of(pieces: list[Piece]) -> Lengths:
    return Lengths(
        np.cumsum([0, *(p.tokens for p in pieces)], dtype=np.int32),
        np.array([p.stop for p in pieces], np.int32),
        np.array([p.prefilling for p in pieces]),
    )


def planned(pieces: list[Piece], first_tokens: int = 32) -> DevicePlan:
    tokens = sum(p.tokens for p in pieces)
    table = torch.arange(len(pieces) * 20, dtype=torch.int32).view(-1, 20)
    slots = torch.arange(tokens + 5)
    return make_plan(lengths_of(pieces), table, slots, GEOMETRY, first_tokens)


def test_sparse_windows_are_those_of_the_cut_with_single_tokens_first() -> None:
    plan = planned(MIXED)
    windows = cut_windows(*lengths_of(MIXED), GEOMETRY)
    sparse = plan.sparse
    assert sparse is not None
    assert sparse.singles == 1
    assert sparse.token_start.tolist() == [108, 0, 32, 102]
    assert sparse.num_tokens.tolist() == [1, 32, 5, 6]
    assert sparse.request.tolist() == [3, 0, 0, 2]
    order = [int(np.flatnonzero(windows.token_start == s)[0]) for s in sparse.token_start]
    for name in ("context_end", "far_begin", "far_end"):
        assert getattr(sparse, name).tolist() == getattr(windows, name)[order].tolist()
    assert windows.sparse[order].all()
    assert (windows.far_end - windows.far_begin)[order].max() <= sparse.most_far == 16
    assert len(plan.slots) == 109


def test_dense_rows_are_the_rest() -> None:
    plan = planned(MIXED)
    dense = plan.dense
    assert dense is not None
    assert dense.tokens.tolist() == [37, *range(38, 38 + 64)]
    # The last one's windows up to `dense_below`, and one that has budget for all of its pages.
    assert dense.request.tolist() == [1, 2, 2]
    assert dense.query_start.tolist() == [0, 1, 33, 65]
    assert dense.seq_lens.tolist() == [41, 64, 96]
    assert (dense.longest, dense.longest_context) == (32, 96)


@pytest.mark.parametrize("pieces", [[Piece(0, 0, 60, True)], [Piece(1, 40, 1, False)]], ids=str)
def test_a_dense_step_is_vllms_own(pieces: list[Piece]) -> None:
    plan = planned(pieces)
    assert plan.sparse is None
    assert plan.dense is None


def test_decoding_alone_has_no_dense_rows() -> None:
    plan = planned([Piece(0, 200, 1, False), Piece(1, 300, 1, False)])
    assert plan.dense is None
    assert plan.sparse is not None
    assert plan.sparse.singles == 2


@pytest.mark.parametrize(
    ("piece", "begun", "first_known"),
    [
        (Piece(0, 0, 31, True), False, None),  # some of the first 32 are still to come
        (Piece(0, 0, 32, True), True, None),
        (Piece(0, 0, 64, True), True, 32),
        (Piece(0, 31, 1, False), True, None),  # decoded
        (Piece(0, 32, 1, False), False, 32),
        (Piece(0, 32, 32, True), False, 32),  # behind a prefix hit
    ],
    ids=str,
)
def test_contexts_begin_when_their_first_tokens_are_there(
    piece: Piece, begun: bool, first_known: int | None
) -> None:
    """Tokens before are encoded then, all at once; those behind, as they come."""
    plan = planned([Piece(1, 90, 1, False), piece])
    assert plan.begun.tolist() == ([1] if begun else [])
    known = piece.stop - first_known if first_known is not None else 0
    first = int(plan.block_table[1, 0])
    assert plan.firsts.tolist() == [0] + [-1] * (piece.tokens - known) + [first] * known


def test_a_span_of_windows() -> None:
    sparse = planned(MIXED).sparse
    assert sparse is not None
    assert sparse.span(0, 3).singles == 1
    part = sparse.span(1, 3)
    assert (len(part), part.singles, part.most_far) == (2, 0, sparse.most_far)
    assert part.token_start.tolist() == [0, 32]


def test_what_is_sent_is_aligned() -> None:
    """Or Triton would compile a program for every set of columns that are not."""
    lengths = [1, 2, 3, 4, 5, 0, 7]
    columns = [np.arange(size) + 100 * size for size in lengths]
    sent = send_columns(columns, torch.device("cpu"))
    assert [column.tolist() for column in sent] == [column.tolist() for column in columns]
    assert {column.dtype for column in sent} == {torch.int32}
    assert all((column.data_ptr() - sent[0].data_ptr()) % 16 == 0 for column in sent)
    stream = make_plan(
        lengths_of(MIXED), torch.zeros(4, 20, dtype=torch.int32), torch.arange(109), GEOMETRY, 32,
        watched=True,
    ).stream  # fmt: skip
    assert stream is not None
    first = stream.request.data_ptr()
    moved = [column for column in stream.carried if isinstance(column, torch.Tensor)]
    assert all((column.data_ptr() - first) % 16 == 0 for column in (*stream[1:7], *moved))
