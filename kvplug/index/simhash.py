"""Sign-hash index: 64 sign bits per token and KV head.

Each key is projected on 64 fixed random planes and only the signs are kept (random-hyperplane
hashing, Charikar 2002). The expected number of equal bits of a probe and a key falls linearly
with the angle between them, so the best-matching token of a page is a page's score. Planes come
from the user's seed, the layer and the KV head: hashes of different steps are comparable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.index.base import IndexShape, PageIndex
from kvplug.numeric import popcount

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Step

BITS = 64


class SimHashIndex(PageIndex):
    """One 64-bit word per token and KV head: ``[pages, Hk, P]``."""

    def __init__(self, shape: IndexShape) -> None:
        """Draws the planes and allocates the words (untouched pages cost no memory)."""
        super().__init__(shape)
        self.planes = draw_planes(shape)
        self._words = torch.zeros(
            (shape.num_pages, shape.num_kv_heads, shape.page), dtype=torch.int64
        )
        self._words_host = self._words.numpy().view(np.uint64)
        self._planes_host = self.planes.numpy()

    @property
    def state(self) -> torch.Tensor:
        """``[pages, Hk, P]`` int64: bit ``b`` of a word is the sign of plane ``b``."""
        return self._words

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """See :meth:`PageIndex.write`."""
        write = _write_words if len(slots) > 1 else _write_words_serial
        write(keys.numpy(), slots.numpy(), self._planes_host, self._words_host)

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score`; the score is the number of equal bits, 0 to 64."""
        windows = step.windows
        _score_pages(
            self._words_host, probes.vectors.numpy(), probes.counts.numpy(), self._planes_host,
            step.sparse_windows, windows.request, windows.far_begin, windows.far_end,
            step.block_table_host, scores.numpy(),
        )  # fmt: skip


def draw_planes(shape: IndexShape) -> torch.Tensor:
    """``[Hk, D, 64]`` float32 Gaussian planes, fixed by seed, layer and model-wide KV head."""
    planes = torch.empty(shape.num_kv_heads, shape.head_dim, BITS)
    for head in range(shape.num_kv_heads):
        key = (shape.seed, shape.layer, shape.first_kv_head + head)
        draw = np.random.default_rng(key).standard_normal((shape.head_dim, BITS), np.float32)
        planes[head] = torch.from_numpy(draw)
    return planes


@njit(cache=True, inline="always")
def _sign_word(vector, planes, sums):  # type: ignore[no-untyped-def]
    """The sign bits of ``vector [D]`` on ``planes [D, 64]``; ``sums [64]`` is scratch.

    One order of additions whatever the batch, so a key's word never depends on its neighbours.
    """
    sums[:] = 0
    for d in range(vector.shape[0]):
        x = vector[d]
        for b in range(64):
            sums[b] += x * planes[d, b]
    word = np.uint64(0)
    for b in range(64):
        word |= np.uint64(sums[b] > 0) << np.uint64(b)
    return word


def _write(keys, slots, planes, words):  # type: ignore[no-untyped-def]
    """``words[slot's page, head, slot's offset] = signs of keys[token, head]``."""
    num_kv_heads, page = words.shape[1:]
    for head in prange(num_kv_heads):
        sums = np.empty(64, dtype=np.float32)
        mine = planes[head]
        for token in range(slots.shape[0]):
            slot = slots[token]
            if slot >= 0:
                words[slot // page, head, slot % page] = _sign_word(keys[token, head], mine, sums)


_write_words = njit(parallel=True, cache=True)(_write)
_write_words_serial = njit(cache=True)(_write)


@njit(parallel=True, cache=True)
def _score_pages(  # type: ignore[no-untyped-def]
    words, vectors, counts, planes, rows, request, far_begin, far_end, block_table, scores
):
    """``scores[w, h, n] = 64 - least Hamming distance of any probe to any token of the page``."""
    num_kv_heads, page = words.shape[1:]
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        row = rows[w]
        sums = np.empty(64, dtype=np.float32)
        probes = np.empty(counts[w], dtype=np.uint64)
        for r in range(counts[w]):
            probes[r] = _sign_word(vectors[w, head, r], planes[head], sums)
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        for n in range(pages.shape[0]):
            tokens = words[pages[n], head]
            nearest = np.int64(64)
            for r in range(probes.shape[0]):
                probe = probes[r]
                for t in range(page):
                    nearest = min(nearest, popcount(tokens[t] ^ probe))
            scores[w, head, n] = 64 - nearest


def simhash_scores_reference(
    keys: torch.Tensor, probes: torch.Tensor, planes: torch.Tensor, page: int
) -> torch.Tensor:
    """Twin of :meth:`SimHashIndex.score` in plain torch, for one window over whole pages.

    Args:
        keys: ``[N * P, Hk, D]`` keys of the far pages in logical order.
        probes: ``[Hk, R, D]``.
        planes: ``[Hk, D, 64]``.
        page: P.

    Returns:
        ``[Hk, N]`` float32.
    """
    key_bits = torch.einsum("thd,hdb->htb", keys.float(), planes) > 0
    probe_bits = torch.einsum("hrd,hdb->hrb", probes.float(), planes) > 0
    equal = (key_bits[:, None] == probe_bits[:, :, None]).sum(-1)  # [Hk, R, N * P]
    return equal.unflatten(-1, (-1, page)).amax((1, 3)).float()
