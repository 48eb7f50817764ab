"""Joined probes: every vector once, and nothing of what another probe gave first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvplug.kernels.join_probes import ProbeVectors, join_probes, join_probes_reference
from kvplug.probe.union import union_reference


def part(
    counts: list[int], most: int, heads: int, dim: int, dtype: torch.dtype, device: str
) -> ProbeVectors:
    """Rows behind a window's vectors are NaN."""
    vectors = torch.full((len(counts), heads, most, dim), torch.nan)
    for s, count in enumerate(counts):
        vectors[s, :, :count] = torch.randn(heads, count, dim)
    return ProbeVectors(
        vectors.to(device, dtype), torch.tensor(counts, dtype=torch.int32, device=device)
    )


def joined_by(
    function: Callable[..., None], parts: list[ProbeVectors]
) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = parts[0].vectors
    windows, heads, _, dim = vectors.shape
    room = sum(part.vectors.shape[2] for part in parts)
    joined = torch.full((windows, heads, room, dim), -7.0, device=vectors.device)
    filled = torch.empty((len(parts) + 1, windows), dtype=torch.int32, device=vectors.device)
    function(parts, joined, filled)
    return joined, filled


@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [(1, 64, torch.float32), (3, 80, torch.bfloat16), (2, 128, torch.float16),
     (8, 256, torch.float32)],
    ids=str,
)  # fmt: skip
def test_twins(heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """Also one whose first vectors equal another's in all heads but one, and unused rows."""
    first = part([3, 1, 0, 40, 3, 2], 40, heads, dim, torch.float32, device)
    second = part([3, 1, 0, 1, 5, 2], 5, heads, dim, dtype, device)
    third = part([2, 1, 0, 3, 1, 3], 3, heads, dim, torch.float32, device)
    first.vectors[:2, :, :5] = second.vectors[:2].float()  # just the same
    first.vectors[3, :, :1] = second.vectors[3, :, :1].float()
    third.vectors[4, :, :1] = first.vectors[4, :, :1]
    third.vectors[3] = first.vectors[3, :, :3]
    third.vectors[3, heads - 1, 2, dim - 1] += 1
    parts = [first, second, third]
    found, expected = (joined_by(f, parts) for f in (join_probes, join_probes_reference))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    assert found[1][-1].tolist() == [5, 2, 0, 43, 8, 7]
    cut = [[p.vectors[s, :, :n].float().cpu() for s, n in enumerate(p.counts.tolist())]
           for p in parts]  # fmt: skip
    for s, rows in enumerate(union_reference(cut)):
        assert torch.equal(found[0][s, :, : rows.shape[1]].cpu(), rows)
        assert (found[0][s, :, rows.shape[1] :] == -7).all()


def test_nan_is_never_the_same(device: str) -> None:
    first = part([2], 2, 2, 64, torch.float32, device)
    first.vectors[0, 1, 1, 63] = torch.nan
    for function in (join_probes, join_probes_reference):
        _, filled = joined_by(function, [first, first])
        assert filled[:, 0].tolist() == [0, 2, 4]


def test_no_windows(device: str) -> None:
    empty = part([], 2, 2, 64, torch.float32, device)
    joined, _ = joined_by(join_probes, [empty, empty])
    assert joined.shape == (0, 2, 4, 64)


def test_what_does_not_fit_is_refused(device: str) -> None:
    one = part([2], 2, 2, 64, torch.float32, device)
    joined = torch.empty(1, 2, 3, 64, device=device)
    filled = torch.empty(3, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="joined has room for 3 vectors of 4"):
        join_probes([one, one], joined, filled)
    with pytest.raises(ValueError, match=r"filled must be int32 \[2, 1\]"):
        join_probes([one], joined, filled)
    with pytest.raises(ValueError, match=r"vectors of part 0 must be .* \[1, 2, R, 64\]"):
        join_probes([one._replace(vectors=one.vectors[:, :1]), one], joined, filled)
