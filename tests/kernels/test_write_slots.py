"""New keys and values reach the pool's copies of their pages to the bit, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.slot_maps import SlotMaps
from kvplug.kernels.write_slots import BLOCK, write_slots, write_slots_reference
from tests.kernels.pools import empty_maps, place, rows_of
from tests.kernels.test_gather_pages import bits, some_bytes


def held(heads: int, device: str) -> SlotMaps:
    """A pool of 7 slots that holds some heads of pages 1, 3 and 4 of 6."""
    maps = empty_maps(6, heads, 7, device)
    place(rows_of([[3, 4] if head % 2 else [1, 3] for head in range(heads)], device), maps)
    return maps


@pytest.mark.parametrize(
    ("page", "heads", "dim", "dtype"),
    [
        (16, 1, 64, torch.float16),
        (32, 3, 80, torch.bfloat16),
        (64, 2, 96, torch.float16),
        (128, 2, 256, torch.bfloat16),
    ],
    ids=str,
)
def test_twin(page: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """Keys and values lie apart, as they come of one projection; some tokens are padding."""
    maps = held(heads, device)
    places = torch.randperm(6 * page)[: BLOCK + 7].to(device)
    places[::5] = -1
    both = some_bytes((len(places), heads + 1, 2, dim), dtype).to(device)[:, :heads]
    pool = some_bytes((7, 2 * page * dim + 32), dtype).to(device)[:, : 2 * page * dim]
    found, expected = pool.clone().view(7, 2, page, dim), pool.clone().view(7, 2, page, dim)
    write_slots(both[:, :, 0], both[:, :, 1], places, maps, found)
    write_slots_reference(both[:, :, 0], both[:, :, 1], places, maps, expected)
    assert torch.equal(bits(found), bits(expected))
    assert not torch.equal(bits(found), bits(pool))


def test_one_token(device: str) -> None:
    """Of a page that one of two heads has in the pool."""
    maps = held(2, device)
    pool = torch.zeros(7, 2, 16, 64, dtype=torch.float16, device=device)
    keys = torch.randn(1, 2, 64).to(device, torch.float16)
    places = torch.tensor([4 * 16 + 5], device=device)
    write_slots(keys, keys + 1, places, maps, pool)
    slot = int(maps.slot_of[4, 1])
    assert torch.equal(pool[slot, :, 5], torch.stack([keys[0, 1], keys[0, 1] + 1]))
    pool[slot, :, 5] = 0
    assert not pool.any()


def test_nothing_is_written_without_tokens_or_copies(device: str) -> None:
    maps = held(1, device)
    pool = torch.zeros(7, 2, 16, 64, dtype=torch.float16, device=device)
    keys = torch.ones(2, 1, 64, dtype=torch.float16, device=device)
    places = torch.tensor([2 * 16, 5 * 16 + 15], device=device)  # of pages that it lacks
    write_slots(keys, keys, places, maps, pool)
    write_slots(keys[:0], keys[:0], places[:0], maps, pool)
    assert not pool.any()


def test_what_cannot_be_written_is_refused(device: str) -> None:
    maps = held(2, device)
    pool = torch.zeros(7, 2, 16, 64, dtype=torch.float16, device=device)
    keys, places = pool[0, :, 0][None], torch.tensor([16], device=device)
    with pytest.raises(ValueError, match=r"keys must be float16 \[T, 2, 64\]"):
        write_slots(keys.float(), keys, places, maps, pool)
    with pytest.raises(ValueError, match=r"values must be float16 \[1, 2, 64\]"):
        write_slots(keys, keys[:, :1], places, maps, pool)
    with pytest.raises(ValueError, match=r"places must be int64 \[1\]"):
        write_slots(keys, keys, places.int(), maps, pool)
    with pytest.raises(ValueError, match=r"pool must be float16 \[7, 2, P, D\]"):
        write_slots(keys, keys, places, maps, pool[:6])
    with pytest.raises(ValueError, match="two bytes a number and contiguous"):
        write_slots(keys.float(), keys.float(), places, maps, pool.float())
