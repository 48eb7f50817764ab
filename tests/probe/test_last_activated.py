"""Last and most activated tokens: copies of queries, and the ones that stand out.

Compared with the twin exactly: a probe is a copy, so any difference is another token.
"""

from __future__ import annotations

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.probe.last_activated import LastAndActivatedProbe, last_and_activated_reference
from kvplug.workspace import Workspace
from tests.steps import Far, step_of

WINDOWS = [
    Far(0, 0, 9, tokens=1), Far(0, 0, 0, tokens=4, sparse=False), Far(1, 0, 9, tokens=60),
    Far(2, 0, 9, tokens=5), Far(2, 0, 9, tokens=6), Far(2, 0, 9, tokens=7),
]  # fmt: skip
TOKENS = 83


def probes_of(
    queries: torch.Tensor, last: int, active: int, heads: int = 1
) -> torch.Tensor:  # fmt: skip
    """``[Hk, R, D]`` of one window that holds all the queries."""
    step = step_of([Far(0, 0, 9, tokens=len(queries))])
    vectors, counts = LastAndActivatedProbe(last, active).build(queries, heads, step, Workspace())
    return vectors[0, :, : counts[0]]


def tokens_of(probes: torch.Tensor, queries: torch.Tensor) -> list[int]:
    """Which tokens the probes of one KV head with one query head are copies of."""
    return [int((queries[:, 0] == probe).all(-1).nonzero()[0]) for probe in probes[0]]


@pytest.mark.parametrize(("last", "active"), [(1, 0), (1, 5), (4, 2), (6, 0), (4, 4), (80, 1)])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 2), (2, 5)])
def test_twin(heads: int, group: int, last: int, active: int) -> None:
    queries = torch.randn(TOKENS, heads * group, 12)
    step = step_of(WINDOWS)
    workspace = Workspace()
    workspace.take("probe.vectors", (10**5,), torch.float32).fill_(float("nan"))
    probe = LastAndActivatedProbe(last, active)
    vectors, counts = probe.build(queries, heads, step, workspace)
    expected = last_and_activated_reference(queries, heads, step, last, active)
    assert len(vectors) == len(counts) == len(expected) == 5
    for built, count, twin in zip(vectors, counts, expected, strict=True):
        assert count == twin.shape[1]
        assert torch.equal(built[:, :count], twin)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_a_short_window_probes_with_every_token(tokens: int) -> None:
    queries = torch.randn(tokens, 4, 6)
    probes = probes_of(queries, last=4, active=4, heads=2)
    assert torch.equal(probes, queries.view(tokens, 2, 2, 6).transpose(0, 1).flatten(1, 2))


def test_one_token_more_than_probes() -> None:
    queries = torch.randn(9, 1, 6)
    tokens = tokens_of(probes_of(queries, last=4, active=4), queries)
    assert tokens[:4] == [5, 6, 7, 8]
    assert len(set(tokens)) == 8


@pytest.mark.parametrize("constant", [0.0, 1.0, -3e4])
def test_constant_queries_give_that_query(constant: float) -> None:
    """No token stands out: no division by the variance, and no NaN."""
    probes = probes_of(torch.full((50, 1, 6), constant), last=3, active=4)
    assert probes.shape == (1, 7, 6)
    assert (probes == constant).all()


@pytest.mark.parametrize("outlier", [0, 17, 45])
@pytest.mark.parametrize("shift", [0.0, 64.0])
@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**10])
def test_a_token_that_stands_out_is_probed(outlier: int, shift: float, scale: float) -> None:
    """Whatever the mean and spread of the queries around it."""
    queries = torch.randn(50, 1, 16)
    queries[outlier] *= 6
    queries = (queries + shift) * scale
    assert tokens_of(probes_of(queries, last=4, active=1), queries) == [46, 47, 48, 49, outlier]


def test_each_head_has_tokens_of_its_own() -> None:
    queries = torch.randn(50, 2, 16)
    queries[7, 0] *= 9
    queries[23, 1] *= 9
    probes = probes_of(queries, last=1, active=1, heads=2)
    assert torch.equal(probes[0, 1], queries[7, 0])
    assert torch.equal(probes[1, 1], queries[23, 1])


def test_a_head_of_a_group_can_speak_for_it() -> None:
    """Bias adds up over the query heads of a KV head, and all of them probe."""
    queries = torch.randn(50, 3, 16)
    queries[31, 2] *= 9
    assert torch.equal(probes_of(queries, last=1, active=1)[0, 3:], queries[31])


def test_the_window_decides_alone() -> None:
    """Neighbours in the batch change nothing (design rule 4)."""
    queries = torch.randn(TOKENS, 2, 12)
    vectors, counts = LastAndActivatedProbe(2, 3).build(
        queries, 1, step_of(WINDOWS), Workspace()
    )  # fmt: skip
    starts = (0, 5, 65, 70, 76)
    for built, count, start, far in zip(
        vectors, counts, starts, [w for w in WINDOWS if w.sparse], strict=True
    ):
        alone = probes_of(queries[start : start + far.tokens].contiguous(), 2, 3)
        assert torch.equal(built[:, :count], alone)


@pytest.mark.parametrize(("last", "active"), [(0, 4), (-1, 0), (1, -1)])
def test_no_probe_is_refused(last: int, active: int) -> None:
    with pytest.raises(KvplugError, match=r"last >= 1 and active >= 0"):
        LastAndActivatedProbe(last, active)
