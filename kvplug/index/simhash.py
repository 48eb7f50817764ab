"""Sign-hash index: 64 sign bits per token and KV head.

Each key is projected on 64 fixed random planes and only the signs are kept (random-hyperplane
hashing, Charikar 2002). The expected number of equal bits of a probe and a key falls linearly
with the angle between them, so a page is known by the token that matches a probe best. Planes come
from the user's seed, the layer and the KV head: hashes of different steps are comparable.

A window of several tokens asks with several, and some of them match every page: a sentence that
the document repeats, a full stop. Their matches say nothing, and as a maximum they would hide those
of the token that asks. So there a probe counts by how much better it matches a page than it does
on the average of the window's far pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.index.base import Index, PageIndex, in_turns, read_pages
from kvplug.index.planes import BITS, LANES, WORDS_PER_VECTOR, draw_planes, probe_words, sign_words
from kvplug.numeric import popcount
from kvplug.stage import Layer, Scratch

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace

PAGES_PER_TASK = 256
"""Pages scored by one thread at a time."""
BYTES_PER_VECTOR = 64
"""Bytes in a vector register, to estimate work."""


@dataclass(frozen=True)
class SimHash(Index):
    """Scores are numbers of equal bits of the best probe and token, 0 to 64.

    In a window of several tokens, less what the probe's best token has on the mean page.
    """

    name = "simhash"

    def for_layer(self, layer: Layer) -> SimHashIndex:
        """See :meth:`Index.for_layer`."""
        return SimHashIndex(layer)


class SimHashIndex(PageIndex):
    """One 64-bit word per token and KV head: ``[pages, Hk, P]``."""

    def __init__(self, layer: Layer) -> None:
        """Draws the planes and allocates the words (untouched pages cost no memory)."""
        super().__init__(layer)
        shape, self._reader = self.shape, layer.row_reader
        self._scratch = layer.shared(Scratch).workspace
        self.planes = draw_planes(shape)
        self._words = torch.zeros(
            (shape.num_pages, shape.num_kv_heads, shape.page), dtype=torch.int64
        )
        self._words_host = self._words.numpy().view(np.uint64)
        self._planes_host = self.planes.numpy()

    @property
    def words(self) -> torch.Tensor:
        """``[pages, Hk, P]`` int64: bit ``b`` of a word is the sign of plane ``b``."""
        return self._words

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`words`."""
        return (self._words,)

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Hashes the pages' keys."""
        heads = self.shape.num_kv_heads
        for part, keys in read_pages(self._reader, sealed.pages, heads, workspace):
            work, pages = keys.numel() * (BITS // LANES), sealed.pages[part]
            _hash_pages(work, keys.numpy(), pages, self._planes_host, self._words_host)

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score` and the stage."""
        windows, vectors, counts = step.windows, probes.vectors, probes.counts.numpy()
        words = np.empty(vectors.shape[:3], dtype=np.uint64)
        probe_words(vectors.numel() * 4, vectors.numpy(), counts, self._planes_host, words)
        work = max(vectors.shape[2] * self.shape.page // WORDS_PER_VECTOR, 1)
        rows = step.sparse_windows
        several = windows.num_tokens[rows] > 1
        most = vectors.shape[2] if several.any() else 0
        num, heads, pages = scores.shape
        found = scores.numpy()
        for part in in_turns(num, heads * most * pages):
            size = part.stop - part.start
            nearest = self._scratch.take(
                "simhash.nearest", (size, heads, most, pages), torch.uint8
            ).numpy()
            _score_pages(
                size * heads * pages * work, self._words_host, words[part], counts[part],
                several[part], rows[part], windows.request, windows.far_begin, windows.far_end,
                step.block_table_host, nearest, found[part],
            )  # fmt: skip
            if most:
                _score_by_excess(
                    nearest.size // BYTES_PER_VECTOR, counts[part], several[part], rows[part],
                    windows.far_begin, windows.far_end, nearest, found[part],
                )  # fmt: skip


@compiled()
def _hash_pages(keys, pages, planes, words):  # type: ignore[no-untyped-def]
    """``words[pages[n], head] = signs of keys[n, head]``, token by token."""
    num_kv_heads = words.shape[1]
    for task in prange(pages.shape[0] * num_kv_heads):
        n, head = task // num_kv_heads, task % num_kv_heads
        sign_words(keys[n, head], planes[head], words[pages[n], head])


@njit(cache=True, inline="always")
def _nearest(tokens, probes):  # type: ignore[no-untyped-def]
    """Least Hamming distance of any probe to any token.

    Probes go four and two at a time, so that a vector of tokens is loaded, and its lanes are
    compared with each other, once for all of them: 1.5 times as fast as one by one.
    """
    count, page = probes.shape[0], tokens.shape[0]
    nearest = np.int64(64)
    r = 0
    while r + 3 < count:
        p0, p1, p2, p3 = probes[r], probes[r + 1], probes[r + 2], probes[r + 3]
        for t in range(page):
            word = tokens[t]
            first = min(popcount(word ^ p0), popcount(word ^ p1))
            second = min(popcount(word ^ p2), popcount(word ^ p3))
            nearest = min(nearest, min(first, second))
        r += 4
    if r + 1 < count:
        p0, p1 = probes[r], probes[r + 1]
        for t in range(page):
            nearest = min(nearest, min(popcount(tokens[t] ^ p0), popcount(tokens[t] ^ p1)))
        r += 2
    if r < count:
        for t in range(page):
            nearest = min(nearest, popcount(tokens[t] ^ probes[r]))
    return nearest


@compiled()
def _score_pages(  # type: ignore[no-untyped-def]
    words, probes, counts, several, rows, request, far_begin, far_end, block_table, nearest, scores
):
    """``scores[w, h, n] = 64 - least Hamming distance of any probe to any token of the page``.

    For windows of several tokens ``nearest[w, h, r, n]`` instead: the distance for each probe.

    All heads of a page lie side by side, so they are scored in turn: at 131,072 tokens and one
    window 1.3 times as fast as head by head.
    """
    num_windows, num_kv_heads = scores.shape[:2]
    blocks = (scores.shape[2] + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in prange(num_windows * blocks):
        w, first = task // blocks, task % blocks * PAGES_PER_TASK
        row = rows[w]
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        for n in range(first, min(first + PAGES_PER_TASK, pages.shape[0])):
            for head in range(num_kv_heads):
                tokens = words[pages[n], head]
                if not several[w]:
                    scores[w, head, n] = 64 - _nearest(tokens, probes[w, head, : counts[w]])
                    continue
                for r in range(counts[w]):
                    best = np.int64(64)
                    for t in range(tokens.shape[0]):
                        best = min(best, popcount(tokens[t] ^ probes[w, head, r]))
                    nearest[w, head, r, n] = best


@compiled()
def _score_by_excess(  # type: ignore[no-untyped-def]
    counts, several, rows, far_begin, far_end, nearest, scores
):
    """``scores[w, h, n] = max over probes of (mean of nearest over pages) - nearest``."""
    num_windows, num_kv_heads = scores.shape[:2]
    for task in prange(num_windows * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        pages = far_end[rows[w]] - far_begin[rows[w]]
        if not several[w] or pages == 0:
            continue
        found = scores[w, head, :pages]
        found[:] = -np.inf
        for r in range(counts[w]):
            mine = nearest[w, head, r, :pages]
            total = np.int64(0)  # whole numbers: the mean does not depend on their order
            for n in range(pages):
                total += mine[n]
            mean = np.float32(total / pages)
            for n in range(pages):
                excess = mean - np.float32(mine[n])
                found[n] = excess if excess > found[n] else found[n]


def simhash_scores_reference(
    keys: torch.Tensor, probes: torch.Tensor, planes: torch.Tensor, page: int,
    several: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Twin of :meth:`SimHashIndex.score` in plain torch, for one window over whole pages.

    Args:
        keys: ``[N * P, Hk, D]`` keys of the far pages in logical order.
        probes: ``[Hk, R, D]``.
        planes: ``[Hk, D, 64]``.
        page: P.
        several: Whether the window has several tokens.

    Returns:
        ``[Hk, N]`` float32.
    """
    key_bits = torch.einsum("thd,hdb->htb", keys.float(), planes) > 0
    probe_bits = torch.einsum("hrd,hdb->hrb", probes.float(), planes) > 0
    equal = (key_bits[:, None] == probe_bits[:, :, None]).sum(-1)  # [Hk, R, N * P]
    best = equal.unflatten(-1, (-1, page)).amax(3)  # [Hk, R, N]
    if several:
        means = best.double().mean(-1, keepdim=True).float()
        return (best - means).amax(1)
    return best.amax(1).float()
