"""At decode a probe is the query itself, whether or not a step takes the shortcut to it."""

from __future__ import annotations

import pytest
import torch

from kvplug.probe import PROBES
from kvplug.probe.base import Probe, queries_themselves
from kvplug.probe.union import UnionProbe
from kvplug.workspace import Workspace
from tests.made_up import layer_of
from tests.steps import Far, step_of

DECODING = [PROBES.get(name)() for name in PROBES if PROBES.get(name).query_at_decode]
DECODING.append(UnionProbe(tuple(DECODING[:2])))
QUERIES = torch.arange(9 * 6 * 4, dtype=torch.float32).view(9, 6, 4)


@pytest.mark.parametrize("probe", DECODING, ids=lambda probe: probe.name)
@pytest.mark.parametrize("long", [False, True], ids=["decode", "mixed"])
def test_one_token_probes_with_its_query(probe: Probe, long: bool) -> None:
    far = [Far(0, 0, 9), Far(1, 0, 9), Far(2, 0, 9, tokens=7 if long else 1)]
    queries = QUERIES[: sum(window.tokens for window in far)]
    bound = probe.for_layer(layer_of(window=8, head_dim=4))
    pages = torch.zeros((3, 10_000 // 8 + 1), dtype=torch.int32)  # of the contexts of step_of
    vectors, counts = bound.build(queries, 3, step_of(far, pages), Workspace())
    for w in (0, 1):
        assert torch.equal(vectors[w, :, : counts[w]], queries[w].view(3, 2, 4))


@pytest.mark.parametrize("probe", DECODING, ids=lambda probe: probe.name)
def test_decoding_copies_nothing(probe: Probe) -> None:
    bound = probe.for_layer(layer_of(window=8, head_dim=4))
    step = step_of([Far(0, 0, 9), Far(1, 0, 9)])
    vectors, _ = bound.build(QUERIES[:2], 3, step, Workspace())
    assert vectors.data_ptr() == QUERIES.data_ptr()


@pytest.mark.parametrize(
    "far",
    [
        [Far(0, 0, 9), Far(1, 0, 0, sparse=False)],
        [Far(0, 0, 9, tokens=2)],
        [Far(0, 0, 9), Far(1, 0, 9, tokens=2)],
    ],
    ids=["one is dense", "a longer window", "both"],
)
def test_other_steps_have_no_shortcut(far: list[Far]) -> None:
    queries = QUERIES[: sum(window.tokens for window in far)]
    assert queries_themselves(queries, 3, step_of(far)) is None
