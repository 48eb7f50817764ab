"""Means of chunks: of their pages' means in the order of the context, at their last pages."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.chunk_means import ChunkEnds, chunk_means, chunk_means_reference

UNTOUCHED = 9.0


def ends_of(places: list[tuple[int, int]], device: str) -> ChunkEnds:
    """Chunks of these rows that end with these pages."""
    columns = torch.tensor(places, dtype=torch.int32, device=device).view(-1, 2)
    return ChunkEnds(*(column.contiguous() for column in columns.T))


@pytest.mark.parametrize("per_chunk", [1, 3, 8])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 80), (2, 128), (1, 256)])
def test_twin(heads: int, dim: int, per_chunk: int, device: str) -> None:
    """To the bit: sums come in the same order. Other pages are left alone."""
    means = torch.randn(50, heads, dim).bfloat16().to(device)
    means[7, 0, 3], means[9, 0, 2] = torch.nan, torch.inf
    # Rows may be strided.
    table = torch.randperm(50).int().view(2, 25).to(device)[:, :24]
    places = [(0, per_chunk), (1, 3 * per_chunk), (0, 2 * per_chunk)]
    ends = ends_of(places, device)
    found, expected = (torch.full_like(means, UNTOUCHED) for _ in range(2))
    chunk_means(means, table, ends, per_chunk, found)
    chunk_means_reference(means, table, ends, per_chunk, expected)
    assert torch.equal(found.nan_to_num(-7), expected.nan_to_num(-7))  # a NaN has many bits
    written = sorted(int(table[row, end - 1]) for row, end in places)
    touched = (expected != UNTOUCHED).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert touched == written


def test_no_chunks(device: str) -> None:
    means = torch.zeros(4, 1, 64, dtype=torch.bfloat16, device=device)
    table = torch.zeros(1, 4, dtype=torch.int32, device=device)
    chunk_means(means, table, ends_of([], device), 2, means)
    assert (means == 0).all()


def test_what_cannot_be_read_is_refused(device: str) -> None:
    means = torch.zeros(4, 1, 64, dtype=torch.bfloat16, device=device)
    table = torch.zeros(1, 4, dtype=torch.int32, device=device)
    ends = ends_of([(0, 2)], device)
    with pytest.raises(ValueError, match=r"chunks must be bfloat16 \[4, 1, 64\]"):
        chunk_means(means, table, ends, 2, means.float())
    with pytest.raises(ValueError, match="at least one page, not 0"):
        chunk_means(means, table, ends, 0, means)
    with pytest.raises(ValueError, match=r"request must be int32 \[1\]"):
        chunk_means(means, table, ends._replace(request=ends.request.long()), 2, means)
