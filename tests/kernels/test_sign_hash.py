"""Sign hashes: every bit is the sign of its projection, at the word of its slot and nowhere else.

A float32 sum of D products is off by at most ``D * 2^-24 * sum |products|`` to first order, so a
bit is certain where the exact projection is further from 0 than that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvplug.index.planes import draw_planes, probe_words
from kvplug.kernels import sign_hash as module
from kvplug.kernels.sign_hash import (
    sign_hash,
    sign_hash_probes,
    sign_hash_probes_reference,
    sign_hash_reference,
)
from tests.kernels.accuracy import EPS
from tests.made_up import layer_shape

BITS = torch.arange(64)


def planes_of(heads: int, dim: int, device: str) -> torch.Tensor:
    return draw_planes(layer_shape(num_kv_heads=heads, head_dim=dim)).to(device)


def assert_signs(words: torch.Tensor, vectors: torch.Tensor, planes: torch.Tensor) -> None:
    """``words [..., Hk]`` are those of ``vectors [..., Hk, D]``, wherever a bit is certain."""
    vectors, planes = vectors.double().cpu(), planes.double().cpu()
    sums = torch.einsum("...hd,hdb->...hb", vectors, planes)
    size = torch.einsum("...hd,hdb->...hb", vectors.abs(), planes.abs())
    certain = sums.abs() > (vectors.shape[-1] + 1) * EPS * size
    assert certain.float().mean() > 0.99
    bits = (words.cpu()[..., None] >> BITS & 1).bool()
    assert torch.equal(bits[certain], (sums > 0)[certain])


def written(tokens: int, heads: int, page: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots, some of them padding, and words in which nothing is written yet."""
    pages = tokens // page + 3
    slots = torch.randperm(pages * page)[:tokens]
    slots[1::5] = -1
    return slots.to(device), torch.empty(pages, heads, page, dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "page", "dtype"),
    [
        (1, 1, 64, 16, torch.bfloat16),
        (17, 3, 80, 32, torch.float32),
        (33, 2, 96, 64, torch.float16),
        (20, 2, 128, 128, torch.bfloat16),
        (15, 1, 256, 32, torch.bfloat16),
    ],
    ids=["one-token", "d80-fp32", "d96-fp16", "d128-page128", "d256"],
)
@pytest.mark.parametrize("few", [0, 512], ids=["large-blocks", "small-blocks"])
def test_keys(
    tokens: int, heads: int, dim: int, page: int, dtype: torch.dtype, few: int,
    device: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "FEW_ROWS", few)
    # Keys as they come: a slice of queries, keys and values side by side.
    keys = torch.randn(tokens, heads + 3, dim + 16).to(device, dtype)[:, 1 : heads + 1, :dim]
    planes = planes_of(heads, dim, device)
    slots, words = written(tokens, heads, page, device)
    before = words.clone()
    sign_hash(keys, slots, planes, words)
    kept = slots >= 0
    where = slots[kept] // page, slots[kept] % page
    assert_signs(words[where[0], :, where[1]], keys[kept], planes)
    words[where[0], :, where[1]] = before[where[0], :, where[1]]
    assert torch.equal(words, before), "slots that got no key keep their words"


@pytest.mark.parametrize(
    ("windows", "heads", "probes", "dim", "dtype"),
    [
        (1, 1, 1, 64, torch.float32),
        (3, 2, 24, 128, torch.bfloat16),
        (2, 3, 9, 80, torch.float32),
        (2, 1, 4, 256, torch.float16),
        (1, 2, 8, 96, torch.bfloat16),
    ],
    ids=["one", "g3-of-8-tokens", "d80-odd", "d256", "d96"],
)
def test_probes(
    windows: int, heads: int, probes: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    """Read in any strides of the first three dimensions."""
    vectors = torch.randn(windows, probes, heads, dim).to(device, dtype).transpose(1, 2)
    planes = planes_of(heads, dim, device)
    words = torch.empty(windows, heads, probes, dtype=torch.int64, device=device)
    sign_hash_probes(vectors, planes, words)
    assert_signs(words.transpose(1, 2), vectors.transpose(1, 2), planes)


def whole(*shape: int) -> torch.Tensor:
    """Small whole numbers: their sums of products are exact, and often 0."""
    return torch.randint(-1, 2, shape).float()


def test_bits_are_those_of_the_twins(device: str) -> None:
    """Of plain torch and on CPU; a projection of exactly 0 is not above the plane."""
    vectors, planes = whole(3, 2, 5, 64), whole(2, 64, 64)
    assert (torch.einsum("shrd,hdb->shrb", vectors, planes) == 0).float().mean() > 0.05
    words = torch.empty(3, 2, 5, dtype=torch.int64, device=device)
    sign_hash_probes(vectors.to(device), planes.to(device), words)
    expected = np.empty((3, 2, 5), np.uint64)
    counts = np.full(3, 5, np.int32)
    probe_words(1, vectors.numpy(), counts, planes.numpy(), expected)
    assert torch.equal(words.cpu(), torch.from_numpy(expected.view(np.int64)))
    again = torch.empty(3, 2, 5, dtype=torch.int64)
    sign_hash_probes_reference(vectors, planes, again)
    assert torch.equal(words.cpu(), again)


def test_words_lie_where_the_twin_puts_them(device: str) -> None:
    keys, planes = whole(40, 3, 80), whole(3, 80, 64)
    slots, words = written(40, 3, 16, device)
    expected = words.clone().cpu()
    sign_hash(keys.to(device), slots, planes.to(device), words)
    sign_hash_reference(keys, slots.cpu(), planes, expected)
    assert torch.equal(words.cpu(), expected)


def test_a_word_does_not_depend_on_its_neighbours(device: str) -> None:
    keys, planes = torch.randn(21, 2, 64, device=device), planes_of(2, 64, device)
    slots = torch.arange(21, device=device)
    together, alone = (torch.zeros(2, 2, 16, dtype=torch.int64, device=device) for _ in range(2))
    sign_hash(keys, slots, planes, together)
    for token in range(21):
        sign_hash(keys[token : token + 1], slots[token : token + 1], planes, alone)
    assert torch.equal(together, alone)


def test_no_tokens_write_nothing(device: str) -> None:
    words = torch.empty(2, 2, 16, dtype=torch.int64, device=device)
    before = words.clone()
    slots = torch.empty(0, dtype=torch.int64, device=device)
    sign_hash(torch.empty(0, 2, 64, device=device), slots, planes_of(2, 64, device), words)
    assert torch.equal(words, before)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"keys": torch.zeros(4, 2, 64, dtype=torch.float64)}, "keys must be bfloat16 or float16"),
        ({"keys": torch.zeros(4, 2, 128)[:, :, ::2]}, "contiguous in the last dimension"),
        ({"keys": torch.zeros(4, 2, 72)}, "Head size must be one of"),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, r"slots must be int64 \[4\]"),
        ({"slots": torch.zeros(4, dtype=torch.int64, device="meta")}, "must be on one device"),
        ({"planes": torch.zeros(2, 64, 32)}, r"planes must be float32 \[2, 64, 64\]"),
        ({"words": torch.zeros(9, 2, 16)}, r"words must be int64 \[pages, 2, P\]"),
        ({"words": torch.zeros(9, 2, 24, dtype=torch.int64)}, "Page size must be one of"),
    ],
    ids=["dtype", "strides", "head-size", "slots", "device", "planes", "words", "page"],
)
def test_what_cannot_be_read_is_refused(changed: dict[str, Any], sentence: str) -> None:
    given = {
        "keys": torch.zeros(4, 2, 64),
        "slots": torch.zeros(4, dtype=torch.int64),
        "planes": torch.zeros(2, 64, 64),
        "words": torch.zeros(9, 2, 16, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=sentence):
        sign_hash(**(given | changed))
