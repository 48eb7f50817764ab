"""The stream of a step on a GPU: the windows that the pipeline on CPU shows what watches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.attention.device.plan import DevicePlan, make_plan
from kvplug.attention.device.stream import StreamWindows
from kvplug.carry import NOWHERE, carried
from kvplug.windows import cut_windows
from tests.attention.device.test_plan import GEOMETRY, MIXED, lengths_of, planned
from tests.made_up import Piece

MANY = [
    *MIXED,
    Piece(4, 64, 1, False),  # a decoded token that begins a window
    Piece(5, 80, 1, False),  # and one that begins the last page of one
    Piece(6, 0, 33, True),
    Piece(7, 250, 7, False),  # replayed after a preemption
]


def watched(pieces: list[Piece]) -> tuple[DevicePlan, StreamWindows]:
    tokens = sum(p.tokens for p in pieces)
    table = torch.arange(len(pieces) * 20, dtype=torch.int32).view(-1, 20)
    plan = make_plan(
        lengths_of(pieces), table, torch.arange(tokens), GEOMETRY, 32, watched=True
    )  # fmt: skip
    assert plan.stream is not None
    return plan, plan.stream


def test_nobody_pays_for_what_nobody_watches() -> None:
    plan = planned(MANY)
    assert plan.stream is None
    assert plan.sparse is not None
    assert plan.sparse.before is None


def test_it_is_the_stream_of_the_pipeline_on_cpu() -> None:
    """Dense windows included, none merged; and the rest of the plan stays as it is."""
    plan, stream = watched(MANY)
    windows = cut_windows(*lengths_of(MANY), GEOMETRY, merge=False)
    for name in ("request", "token_start", "num_tokens", "context_end", "far_end"):
        column = getattr(stream, name)
        assert column.dtype == torch.int32
        assert column.tolist() == getattr(windows, name).tolist()
        assert np.array_equal(getattr(stream.windows, name), getattr(windows, name))
    assert len(stream) == len(windows) == 2 + 1 + 3 + 1 + 1 + 1 + 2 + 7
    assert stream.prefills.tolist() == [int(MANY[r].prefilling) for r in windows.request]
    plain = planned(MANY)
    for found, expected in ((plan.sparse, plain.sparse), (plan.dense, plain.dense)):
        assert found is not None
        assert expected is not None
        for mine, other in zip(found, expected, strict=True):
            if isinstance(other, torch.Tensor):
                assert torch.equal(mine, other)
            elif other is not None:
                assert mine == other


def test_what_is_carried_lies_where_it_does_on_cpu() -> None:
    """Only windows that move something are among those that carry."""
    plan, stream = watched(MANY)
    host, moving = stream.windows, []
    for s in range(len(stream)):
        end, first = int(host.context_end[s]), int(host.context_end[s] - host.num_tokens[s])
        places = carried(first, end, MANY[host.request[s]].prefilling, 32, 16)
        if places[1] != NOWHERE:
            moving.append((int(host.token_start[s]), *places))
    found = stream.carried
    assert len(found) == len(moving) > 0
    columns = (found.token_start, found.before, found.here, found.also)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == moving
    assert found.prefills.tolist() == [1] * 5 + [0] * 2 + [1] * 2 + [0]
    assert plan.sparse is not None
    rows = found.sparse.tolist()
    starts = [-1 if row < 0 else int(plan.sparse.token_start[row]) for row in rows]
    is_sparse = host.sparse[np.searchsorted(host.token_start, found.token_start.numpy())]
    expected = np.where(is_sparse, found.token_start.numpy(), -1)
    assert starts == expected.tolist()
    assert (expected >= 0).any()
    assert (expected < 0).any()


def test_sparse_windows_know_where_to_read() -> None:
    """Also those of a span; single tokens, which come first, are in the order of the others."""
    plan, _ = watched(MANY)
    sparse = plan.sparse
    assert sparse is not None
    assert sparse.before is not None
    assert sparse.before.dtype == torch.int32
    expected = []
    for row in range(len(sparse)):
        end, tokens = int(sparse.context_end[row]), int(sparse.num_tokens[row])
        prefilling = MANY[int(sparse.request[row])].prefilling
        expected.append(carried(end - tokens, end, prefilling, 32, 16)[0])
    assert sparse.before.tolist() == expected
    part = sparse.span(1, 4)
    assert part.before is not None
    assert part.before.tolist() == expected[1:4]


@pytest.mark.parametrize("pieces", [[Piece(0, 0, 60, True)], [Piece(1, 40, 1, False)]], ids=str)
def test_dense_steps_are_watched(pieces: list[Piece]) -> None:
    plan, stream = watched(pieces)
    assert plan.sparse is None
    assert len(stream) == (2 if pieces[0].prefilling else 1)
    assert len(stream.carried) == (2 if pieces[0].prefilling else 0)
