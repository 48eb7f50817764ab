"""Bucket index: locality-sensitive hash tables, several rounds of them in one 64-bit word.

HAX's "sign bin" hashing (arXiv 2507.00449): a key's bucket is the signs of its centred projections
on random planes, and a query may attend to what shares its bucket. Several independent rounds
(Kitaev et al. 2020, Reformer, arXiv 2001.04451; Chen et al. 2025, MagicPIG, ICLR 2025) tell apart
by how often two vectors meet: the chance per round is ``(1 - angle / pi) ** bits``.

A page's score is the number of rounds in which its best token meets the best probe, 0 for a page
without a hit. Of pages with equally many, selectors prefer the newest by themselves, so a bucket
that overflows keeps its newest pages, as HAX's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.index.base import Index, PageIndex, read_pages
from kvplug.index.centre import Centre, subtract
from kvplug.index.planes import BITS, LANES, WORDS_PER_VECTOR, draw_planes, sign_words
from kvplug.numeric import popcount
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace

OPERATIONS = 2
"""Vector operations per word, of those of a simple Hamming distance, to estimate work."""
PAGES_PER_TASK = 256
"""Pages scored by one thread at a time."""


@dataclass(frozen=True)
class Buckets(Index):
    """Scores are numbers of rounds, 0 to ``rounds``, in which the best probe and token meet."""

    name = "buckets"

    bits: int = 2
    """Sign bits of a bucket's number: a round has ``2 ** bits`` buckets."""
    rounds: int = 32
    """Independent hash rounds; ``bits * rounds`` is at most 64."""

    def __post_init__(self) -> None:
        """Refuses what does not fit a word."""
        if self.bits < 1 or self.rounds < 1 or self.bits * self.rounds > BITS:
            raise KvplugError(
                f"Index 'buckets' needs bits >= 1, rounds >= 1 and bits * rounds <= {BITS}, not "
                f"{self.bits}, {self.rounds}."
            )

    def for_layer(self, layer: Layer) -> BucketIndex:
        """See :meth:`Index.for_layer`."""
        return BucketIndex(layer, self.bits, self.rounds)


class BucketIndex(PageIndex):
    """One 64-bit word per token and KV head: ``[pages, Hk, P]``; ``bits`` of it per round."""

    def __init__(self, layer: Layer, bits: int, rounds: int) -> None:
        """Draws the planes and allocates the words (untouched pages cost no memory)."""
        super().__init__(layer)
        shape, self._reader = self.shape, layer.row_reader
        self.rounds = rounds
        self.planes = draw_planes(shape)
        self.centre = layer.own(Centre)
        self.words = torch.zeros(
            (shape.num_pages, shape.num_kv_heads, shape.page), dtype=torch.int64
        )
        """``[pages, Hk, P]`` int64: bit ``b`` of a word is the sign of plane ``b``."""
        self._words_host = self.words.numpy().view(np.uint64)
        self._planes_host = self.planes.numpy()
        tops = sum(1 << (round_ * bits + bits - 1) for round_ in range(rounds))
        used = (1 << (bits * rounds)) - 1
        self._masks = np.uint64(used & ~tops), np.uint64(tops)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`words`."""
        return (self.words,)

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Hashes the pages' keys, centred by the mean of the request that seals them.

        Requests that share a page share their first one too, and with it the mean.
        """
        heads = self.shape.num_kv_heads
        sealers = np.repeat(step.windows.request, np.diff(sealed.starts))
        for part, keys in read_pages(self._reader, sealed.pages, heads, workspace):
            _hash_pages(
                keys.numel() * (BITS // LANES), keys.numpy(), sealed.pages[part], sealers[part],
                step.block_table_host, self.centre.keys_host, self._planes_host, self._words_host,
            )  # fmt: skip

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score`; the score is the number of rounds hit, 0 to ``rounds``.

        Probe ``r`` of a window is centred as query head ``r % G`` of the KV head's group: probes
        come token by token, all heads of one token together.
        """
        windows, centre = step.windows, self.centre
        vectors, counts = probes.vectors, probes.counts.numpy()
        pages = (windows.request, windows.far_begin, windows.far_end, step.block_table_host)
        words = np.empty(vectors.shape[:3], dtype=np.uint64)
        _hash_probes(
            vectors.numel() * (BITS // LANES), vectors.numpy(), counts,
            centre.queries_host, step.sparse_windows, windows.request, step.block_table_host,
            self._planes_host, words,
        )  # fmt: skip
        work = max(vectors.shape[2] * self.shape.page * OPERATIONS // WORDS_PER_VECTOR, 1)
        _score_pages(
            scores.numel() * work, self._words_host, words, counts, self.rounds, *self._masks,
            step.sparse_windows, *pages, scores.numpy(),
        )  # fmt: skip


@compiled()
def _hash_pages(  # type: ignore[no-untyped-def]
    keys, pages, request, block_table, mean_keys, planes, words
):
    """``words[pages[n], head] = signs of the centred keys[n, head]``, token by token."""
    num_kv_heads, page, dim = keys.shape[1:]
    for task in prange(pages.shape[0] * num_kv_heads):
        n, head = task // num_kv_heads, task % num_kv_heads
        mean = mean_keys[block_table[request[n], 0], head]
        centred = np.empty((page, dim), dtype=np.float32)
        for token in range(page):
            subtract(keys[n, head, token], mean, centred[token])
        sign_words(centred, planes[head], words[pages[n], head])


@compiled()
def _hash_probes(  # type: ignore[no-untyped-def]
    vectors, counts, mean_queries, rows, request, block_table, planes, words
):
    """``words[w, h, r] = signs of the centred probe``, for r < counts[w]."""
    num_kv_heads = vectors.shape[1]
    group = mean_queries.shape[1] // num_kv_heads
    for task in prange(vectors.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        page = block_table[request[rows[w]], 0]
        centred = np.empty((counts[w], vectors.shape[3]), dtype=np.float32)
        for r in range(counts[w]):
            mean = mean_queries[page, head * group + r % group]
            subtract(vectors[w, head, r], mean, centred[r])
        sign_words(centred, planes[head], words[w, head, : counts[w]])


@njit(cache=True, inline="always")
def _misses(difference, low, top):  # type: ignore[no-untyped-def]
    """Rounds whose bits are not all zero in ``difference``.

    ``top`` is the highest bit of every round and ``low`` the others. Adding ``low`` carries into
    a round's highest bit if any lower one is set, and never into the next round.
    """
    return popcount((((difference & low) + low) | difference) & top)


@njit(cache=True, inline="always")
def _fewest_misses(tokens, probes, low, top):  # type: ignore[no-untyped-def]
    """Of any probe and any token; two probes at a time share the loads of the tokens."""
    count, fewest = probes.shape[0], np.int64(BITS)
    for r in range(0, count - 1, 2):
        p0, p1 = probes[r], probes[r + 1]
        for t in range(tokens.shape[0]):
            best = min(_misses(tokens[t] ^ p0, low, top), _misses(tokens[t] ^ p1, low, top))
            fewest = min(fewest, best)
    if count % 2:
        for t in range(tokens.shape[0]):
            fewest = min(fewest, _misses(tokens[t] ^ probes[count - 1], low, top))
    return fewest


@compiled()
def _score_pages(  # type: ignore[no-untyped-def]
    words, probes, counts, rounds, low, top, rows, request, far_begin, far_end, block_table, scores
):
    """``scores[w, h, n] = most rounds in which any probe meets any token of the page``."""
    num_windows, num_kv_heads = scores.shape[:2]
    blocks = (scores.shape[2] + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in prange(num_windows * blocks):
        w, first = task // blocks, task % blocks * PAGES_PER_TASK
        row = rows[w]
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        for n in range(first, min(first + PAGES_PER_TASK, pages.shape[0])):
            for head in range(num_kv_heads):
                mine = probes[w, head, : counts[w]]
                misses = _fewest_misses(words[pages[n], head], mine, low, top)
                scores[w, head, n] = rounds - misses


def bucket_scores_reference(
    keys: torch.Tensor, probes: torch.Tensor, planes: torch.Tensor, bits: int, page: int
) -> torch.Tensor:
    """Twin of :meth:`BucketIndex.score` in plain torch, for one window over whole pages.

    Args:
        keys: ``[N * P, Hk, D]`` centred keys of the far pages in logical order.
        probes: ``[Hk, R, D]`` centred.
        planes: ``[Hk, D, rounds * bits]``.
        bits: Of a bucket's number.
        page: P.

    Returns:
        ``[Hk, N]`` float32.
    """
    key_bits = torch.einsum("thd,hdb->htb", keys.float(), planes) > 0
    probe_bits = torch.einsum("hrd,hdb->hrb", probes.float(), planes) > 0
    equal = (key_bits[:, None] == probe_bits[:, :, None]).unflatten(-1, (-1, bits))
    hits = equal.all(-1).sum(-1)  # [Hk, R, N * P]
    return hits.unflatten(-1, (-1, page)).amax((1, 3)).float()
