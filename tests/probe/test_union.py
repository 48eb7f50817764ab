"""Union probe: all vectors of its parts in order, and nothing twice at decode."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.probe.base import Probe, Probes
from kvplug.probe.last_activated import LastAndActivatedProbe, last_and_activated_reference
from kvplug.probe.mean import MeanProbe, mean_queries_reference
from kvplug.probe.union import UnionProbe, union_reference
from kvplug.stage import Layer
from kvplug.step import Step
from kvplug.workspace import Workspace
from tests.made_up import layer_of
from tests.steps import Far, step_of

WINDOWS = [
    Far(0, 0, 9, tokens=1), Far(0, 0, 0, tokens=4, sparse=False), Far(1, 0, 9, tokens=20),
    Far(2, 0, 9, tokens=5), Far(2, 0, 9, tokens=2), Far(3, 0, 9, tokens=1),
]  # fmt: skip
TOKENS = 33


def rows(probe: Probe, queries: torch.Tensor, heads: int, step: Step) -> list[torch.Tensor]:
    """What a probe builds, one ``[Hk, R_w, D]`` per sparse window."""
    workspace = Workspace()
    for name in ("probe.vectors", "probe.joined", "probe.part0"):
        workspace.take(name, (10**5,), torch.float32).fill_(float("nan"))
    vectors, counts = probe.build(queries, heads, step, workspace)
    assert vectors.shape[:2] == (len(step.sparse_windows), heads)
    return [built[:, :count] for built, count in zip(vectors, counts, strict=True)]


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("order", [1, -1])
def test_twin(heads: int, group: int, order: int) -> None:
    """Of integer queries, which every probe copies or adds up exactly."""
    queries = torch.randint(-99, 99, (TOKENS, heads * group, 12)).float()
    step = step_of(WINDOWS)
    last = last_and_activated_reference(queries, heads, step, 2, 3)
    few = last_and_activated_reference(queries, heads, step, 1, 0)
    parts = [list(mean_queries_reference(queries, heads, step)), last, few][::order]
    probes = (MeanProbe(), LastAndActivatedProbe(2, 3), LastAndActivatedProbe(1, 0))[::order]
    built = rows(UnionProbe(probes), queries, heads, step)
    for mine, twin in zip(built, union_reference(parts), strict=True):
        assert torch.equal(mine, twin)


def test_sizes() -> None:
    """At decode the query itself, once; else what every part adds."""
    queries = torch.randn(TOKENS, 6, 12)
    built = rows(UnionProbe((MeanProbe(), LastAndActivatedProbe())), queries, 3, step_of(WINDOWS))
    assert [mine.shape[1] // 2 for mine in built] == [1, 1 + 8, 1 + 5, 1 + 2, 1]
    assert torch.equal(built[0], queries[0].view(3, 2, 12))


def test_one_head_that_differs_is_enough() -> None:
    """Counts are a window's; a part that repeats the first in all heads but one is kept whole."""
    queries = torch.ones(2, 2, 4)
    queries[1, 1] = 3.0  # the second head's mean is 2, its last query 3
    union = UnionProbe((MeanProbe(), LastAndActivatedProbe(1, 0)))
    (mine,) = rows(union, queries, 2, step_of([Far(0, 0, 9, tokens=2)]))
    assert mine[:, :, 0].tolist() == [[1, 1], [2, 3]]


def test_a_shorter_first_part_is_no_repetition() -> None:
    queries = torch.randn(3, 1, 4)
    union = UnionProbe((LastAndActivatedProbe(1, 0), LastAndActivatedProbe(2, 0)))
    (mine,) = rows(union, queries, 1, step_of([Far(0, 0, 9, tokens=3)]))
    assert torch.equal(mine[0], queries[[2, 1, 2], 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_queries_pass(bad: float) -> None:
    queries = torch.full((1, 2, 4), bad)
    (mine,) = rows(UnionProbe((MeanProbe(), MeanProbe())), queries, 1, step_of([Far(0, 0, 9)]))
    assert not mine.isfinite().any()


def test_every_part_is_bound() -> None:
    @dataclass(frozen=True)
    class Named(Probe):
        name = "named"
        layer: int = -1

        def for_layer(self, layer: Layer) -> Probe:
            return Named(layer.shape.layer)

        def build(
            self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
        ) -> Probes:
            raise NotImplementedError

    assert UnionProbe((Named(), Named())).for_layer(layer_of(layer=5)) == UnionProbe(
        (Named(5), Named(5))
    )


def test_no_probe_is_refused() -> None:
    with pytest.raises(KvplugError, match="at least one"):
        UnionProbe(())
