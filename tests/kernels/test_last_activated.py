"""The last and most activated queries are copied to the bit, and chosen as on CPU."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.last_activated import (
    activation_bias,
    last_activated,
    last_activated_reference,
)
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.workspace import Workspace
from tests.kernels.queries import query_windows
from tests.steps import Far, step_of

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
COUNTS = [33, 0, 1, 7, 6, 40]
"""Tokens of windows: more than are probed, none, one, and just as many or one more."""


def choose(
    windows: QueryWindows, kv_heads: int, last: int, active: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors and counts by the kernel, and by the twin; what is not written is equal."""
    num, (_, heads, dim) = len(windows.num_tokens), windows.queries.shape
    device = windows.queries.device
    shape = num, kv_heads, heads // kv_heads * (last + active), dim
    found = torch.zeros(shape, dtype=dtype, device=device)
    counts = torch.empty(num, dtype=torch.int32, device=device)
    bias = torch.empty(num, heads, 40, device=device)
    last_activated(windows, last, active, bias, found, counts)
    expected, expected_counts = torch.zeros_like(found), torch.empty_like(counts)
    last_activated_reference(windows, last, active, None, expected, expected_counts)
    return found, counts, expected, expected_counts


def assert_apart(windows: QueryWindows, kv_heads: int, last: int, active: int) -> None:
    """The chosen tokens stand out by more than rounding can make of their bias.

    Of ``G * D`` summands, each known within a few roundings of 2^-24 of their sum.
    """
    for s in range(len(windows.num_tokens)):
        mine = windows.of(s).double().unflatten(1, (kv_heads, -1))
        for head in range(kv_heads if len(mine) > last + active else 0):
            ranked = activation_bias(mine[:, head])[: len(mine) - last].sort(descending=True).values
            gaps = (ranked[:active] - ranked[1 : active + 1]) / ranked[:active]
            assert (gaps > 1e-5).all()


@SHAPES
@pytest.mark.parametrize(("last", "active"), [(4, 2), (2, 4), (1, 0)])
def test_twin(
    kv_heads: int, group: int, dim: int, dtype: torch.dtype, last: int, active: int, device: str
) -> None:
    windows = query_windows(COUNTS, kv_heads * group, dim, dtype, device)
    assert_apart(windows, kv_heads, last, active)
    kept = dtype if last == 4 else torch.float32  # either is allowed
    found, counts, expected, expected_counts = choose(windows, kv_heads, last, active, kept)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(found, expected)


def test_probes_are_those_of_the_stage_on_cpu(device: str) -> None:
    windows = query_windows([33, 1, 6, 40], 6, 64, torch.float32, device)
    assert_apart(windows, 2, 4, 2)
    found, counts, _, _ = choose(windows, 2, 4, 2, torch.float32)
    step = step_of([Far(0, 0, 9, tokens=tokens) for tokens in windows.num_tokens.tolist()])
    queries = windows.queries.cpu().contiguous()
    probes = LastAndActivatedProbe(4, 2).build(queries, 2, step, Workspace())
    assert torch.equal(counts.cpu(), probes.counts)
    for s, count in enumerate(probes.counts):
        assert torch.equal(found[s, :, :count].cpu(), probes.vectors[s, :, :count])


def test_decode_copies_every_query(device: str) -> None:
    """Without scratch; unused rows count 0 and are left alone."""
    windows = query_windows([1, 1, 0], 6, 64, torch.bfloat16, device)
    vectors = torch.zeros(3, 2, 3, 64, dtype=torch.bfloat16, device=device)
    counts = torch.empty(3, dtype=torch.int32, device=device)
    last_activated(windows, 4, 4, None, vectors, counts)
    assert counts.tolist() == [3, 3, 0]
    assert torch.equal(vectors[:2], windows.queries.unflatten(1, (2, 3)))
    assert (vectors[2] == 0).all()


@pytest.mark.parametrize("value", [1.0, torch.nan], ids=["equal", "nan"])
def test_of_equal_tokens_the_first_are_chosen(value: float, device: str) -> None:
    """Also where one NaN in the window leaves no bias a number, as on CPU."""
    windows = query_windows([12], 2, 64, torch.float32, device)
    windows.queries.copy_(windows.queries if value != value else torch.ones_like(windows.queries))
    windows.queries[5, :, 3] = value
    vectors = torch.zeros(1, 1, 8, 64, device=device)
    counts = torch.empty(1, dtype=torch.int32, device=device)
    last_activated(windows, 1, 3, torch.empty(1, 2, 12, device=device), vectors, counts)
    expected = windows.queries[[11, 0, 1, 2]].flatten(0, 1)
    assert torch.equal(vectors[0, 0], expected)


def test_a_head_whose_queries_are_equal_says_nothing(device: str) -> None:
    windows = query_windows([12], 2, 64, torch.float32, device)
    windows.queries[:, 0] = 1.5
    assert_apart(windows, 1, 1, 3)
    found, _, expected, _ = choose(windows, 1, 1, 3, torch.float32)
    assert torch.equal(found, expected)
    order = activation_bias(windows.queries[:, 1:])[:11].argsort(descending=True)
    assert torch.equal(found[0, 0, 3::2], windows.queries[order[:3], 1])


def test_what_cannot_be_chosen_is_refused(device: str) -> None:
    windows = query_windows([9], 6, 64, torch.float32, device)
    vectors = torch.zeros(1, 2, 24, 64, device=device)
    counts, bias = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, 6, 9)
    bias = bias.to(device)
    with pytest.raises(ValueError, match="needs last >= 1 and active >= 0, not 0, 4"):
        last_activated(windows, 0, 4, bias, vectors, counts)
    with pytest.raises(ValueError, match=r"vectors must be float32 \[1, 2, 18, 64\]"):
        last_activated(windows, 3, 3, bias, vectors, counts)
    with pytest.raises(ValueError, match=r"bias must be float32 \[1, 6, W\]"):
        last_activated(windows, 4, 4, bias[:, :3], vectors, counts)
    with pytest.raises(ValueError, match="multiple of KV heads, not 6 of 4"):
        last_activated(windows, 4, 4, bias, vectors.view(1, 4, 12, 64), counts)
