"""Mean keys on two levels: of each page, and of each chunk of pages.

The mean key is HCAM's key of a memory chunk (Lampinen et al. 2021, arXiv 2105.14039); a chunk of
chunks is looked into only where its own mean promises something. A page's mean is computed when
the page leaves the local region, from the keys in the cache, so it knows nothing of drafts that
were rejected; a chunk's with its last page, from the means of its pages. Both are kept as bfloat16.

By Jensen's inequality ``|b| exp(q . mean_b) <= sum of exp(q . k)`` over a page's keys: a page
whose keys point in many directions promises less than it holds.
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
from kvplug.numeric import dot_bfloat16, from_bfloat16, to_bfloat16
from kvplug.select.bisection import put_in_order, threshold_of
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace

LANES = 16
"""Floats in a vector register, to estimate work."""
HEADS = ("each", "all")
REDUCES = ("sum", "max")


@dataclass(frozen=True)
class ChunkMean(Index):
    """Scores are logits of page means; pages of chunks not looked into score minus infinity."""

    name = "chunk_mean"
    gives = frozenset({"logits", "chunks", "means"})

    pages: int = 8
    """Pages of a chunk. Chunks begin at multiples of it in the request."""
    spread: float = 4.0
    """The chunks looked into together hold this many times the budget."""
    heads: str = "each"
    """Whether ``each`` KV head ranks for itself, or ``all`` take the pages that they agree on."""
    reduce: str = "max"
    """How a page's logits, one for each probe (of all KV heads, where these agree), become its
    score: ``max``, or ``sum``, which is given as the mean to stay on the scale of logits."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        if self.pages < 1:
            raise KvplugError(f"chunk_mean needs pages >= 1 per chunk, not {self.pages}.")
        if not self.spread >= 1:
            raise KvplugError(
                f"chunk_mean needs spread >= 1, chunks for the whole budget, not {self.spread}."
            )
        for option, value, known in (
            ("heads", self.heads, HEADS), ("reduce", self.reduce, REDUCES),
        ):  # fmt: skip
            if value not in known:
                raise KvplugError(
                    f"chunk_mean needs {option} to be {known[0]!r} or {known[1]!r}, not {value!r}."
                )

    def for_layer(self, layer: Layer) -> ChunkMeanIndex:
        """See :meth:`Index.for_layer`."""
        return ChunkMeanIndex(self, layer)


class ChunkMeanIndex(PageIndex):
    """Two bfloat16 vectors per page and KV head, ``[pages, Hk, D]`` each.

    The mean of a chunk lies at the chunk's *last* page. Requests that share a page share everything
    before it, but may go on in different ways behind it.

    Args:
        options: The stage.
        layer: The layer.
    """

    def __init__(self, options: ChunkMean, layer: Layer) -> None:
        """Allocates the means (untouched pages cost no memory)."""
        super().__init__(layer)
        self._options = options
        self._reader = layer.reader
        shape = self.shape.num_pages, self.shape.num_kv_heads, self.shape.head_dim
        self._means = torch.zeros(shape, dtype=torch.int16)
        self._chunks = torch.zeros(shape, dtype=torch.int16)
        self._means_host = self._means.numpy().view(np.uint16)
        self._chunks_host = self._chunks.numpy().view(np.uint16)

    @property
    def means(self) -> torch.Tensor:
        """See :attr:`PageIndex.means`."""
        return self._means.view(torch.bfloat16)

    @property
    def chunks(self) -> torch.Tensor:
        """``[pages, Hk, D]`` bfloat16: mean of the chunk that ends with the page."""
        return self._chunks.view(torch.bfloat16)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Means, and means of chunks."""
        return (self._means, self._chunks)

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Summarises pages, and the chunks that are complete now."""
        heads = self.shape.num_kv_heads
        for part, keys in read_pages(self._reader, sealed.pages, heads, workspace):
            work, pages = keys.numel() // LANES, sealed.pages[part]
            _write_page_means(work, keys.numpy(), pages, self._means_host)
        self._write_chunks(step, sealed)

    def _write_chunks(self, step: Step, sealed: Sealing) -> None:
        """Summarises the chunks that are complete now."""
        windows = step.windows
        _write_chunk_means(
            len(sealed.pages) * self.shape.num_kv_heads * self.shape.head_dim // LANES,
            sealed.logical, sealed.starts, windows.request, windows.far_begin, windows.far_end,
            step.block_table_host, self._options.pages, self._means_host, self._chunks_host,
        )  # fmt: skip

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score`."""
        windows, options = step.windows, self._options
        rows, num_kv_heads, far = scores.shape
        looks = far // options.pages + min(far, int(step.max_selected * min(options.spread, far)))
        products = rows * num_kv_heads * looks * probes.vectors.shape[2]
        _score_pages(
            products * (self.shape.head_dim // LANES + 1), self._means_host, self._chunks_host,
            probes.vectors.numpy(), probes.counts.numpy(), step.sparse_windows,
            windows.request, windows.far_begin, windows.far_end, windows.num_selected,
            step.block_table_host, options.pages, options.spread, np.float32(self.shape.scale),
            options.heads == "all", options.reduce == "sum", scores.numpy(),
            scores.numpy().view(np.uint32),
        )  # fmt: skip


@njit(cache=True, fastmath={"reassoc", "nsz"})
def _sum(values):  # type: ignore[no-untyped-def]
    """The sum of ``values [P]``, in an order that depends on nothing but P."""
    total = np.float32(0)
    for value in values:
        total += value
    return total


@compiled()
def _write_page_means(keys, pages, means):  # type: ignore[no-untyped-def]
    """``means[pages[n], head] = mean of keys[n, head] [D, P]``, rounded once."""
    heads, dim, page = keys.shape[1:]
    for task in prange(pages.shape[0] * heads):
        n, head = task // heads, task % heads
        for d in range(dim):
            means[pages[n], head, d] = to_bfloat16(_sum(keys[n, head, d]) / np.float32(page))


@compiled()
def _write_chunk_means(  # type: ignore[no-untyped-def]
    logical, starts, request, far_begin, far_end, block_table, per_chunk, means, chunks
):
    """Writes the mean of every complete chunk of which a page was sealed, if none is a sink."""
    num_kv_heads, dim = means.shape[1:]
    for head in prange(num_kv_heads):
        total = np.empty(dim, dtype=np.float32)
        for s in range(request.shape[0]):
            for i in range(starts[s], starts[s + 1]):
                chunk = logical[i] // per_chunk
                if i + 1 < starts[s + 1] and logical[i + 1] // per_chunk == chunk:
                    continue
                end = (chunk + 1) * per_chunk
                if end > far_end[s] or end - per_chunk < far_begin[s]:
                    continue
                total[:] = 0
                for page in block_table[request[s], end - per_chunk : end]:
                    for d in range(dim):
                        total[d] += from_bfloat16(means[page, head, d])
                out = chunks[block_table[request[s], end - 1], head]
                for d in range(dim):
                    out[d] = to_bfloat16(total[d] / np.float32(per_chunk))


@njit(cache=True, inline="always")
def _relevance(probes, count, means, first, last, scale, is_sum):  # type: ignore[no-untyped-def]
    """Score of a page or chunk by KV heads ``first`` to ``last``; ``means [Hk, D]``."""
    best, total = np.float32(np.nan), np.float32(0)
    for head in range(first, last):
        mean = means[head]
        for r in range(count):
            product = dot_bfloat16(probes[head, r], mean)
            # NaN only where every product is, so that the pipeline can tell.
            best = product if product > best or best != best else best
            total += product
    return scale * (total / np.float32((last - first) * count) if is_sum else best)


@njit(cache=True)
def _rank(orders, wanted):  # type: ignore[no-untyped-def]
    """Sets ``orders [chunks]``, bits of scores, to 1 for the ``wanted`` best and 0 for the rest."""
    put_in_order(orders)
    threshold, skip = threshold_of(orders, wanted)
    for c in range(orders.shape[0]):
        is_best = orders[c] > threshold or (orders[c] == threshold and skip <= 0)
        skip -= orders[c] == threshold
        orders[c] = is_best


@compiled()
def _score_pages(  # type: ignore[no-untyped-def]
    means, chunks, vectors, counts, rows, request, far_begin, far_end, num_selected, block_table,
    per_chunk, spread, scale, heads_agree, is_sum, scores, bits,
):  # fmt: skip
    """Writes ``scores`` as :class:`ChunkMean` says; ``bits`` is the same memory as integers.

    Ranks of chunks wait in the row that they are about to become: chunk ``c``'s at entry ``c``. Its
    pages' entries begin no earlier, so going from the last chunk to the first, none is overwritten
    before it was read.
    """
    num_kv_heads = means.shape[1]
    sets = 1 if heads_agree else num_kv_heads
    for task in prange(rows.shape[0] * sets):
        w, head = task // sets, task % sets
        until = num_kv_heads if heads_agree else head + 1
        row, count, probes = rows[w], counts[w], vectors[w]
        begin, end = far_begin[row], far_end[row]
        pages = block_table[request[row], :end]
        out = scores[w, head, : end - begin]
        # Chunks that lie among the far pages as a whole.
        first = (begin + per_chunk - 1) // per_chunk
        last = max(end // per_chunk, first)
        wanted = int(np.ceil(min(spread * num_selected[row] / per_chunk, last - first)))
        is_ranked = wanted < last - first
        ranks = bits[w, head, : last - first]
        if is_ranked:
            for c in range(first, last):
                mean = chunks[pages[(c + 1) * per_chunk - 1]]
                out[c - first] = _relevance(probes, count, mean, head, until, scale, is_sum)
            _rank(ranks, wanted)
        # From the back: the pages behind the last chunk, the chunks, those before the first.
        for c in range(last, first - 2, -1):
            is_ruled_out = is_ranked and first <= c < last and ranks[c - first] == 0
            for n in range(max(c * per_chunk, begin), min((c + 1) * per_chunk, end)):
                out[n - begin] = (
                    -np.inf
                    if is_ruled_out
                    else _relevance(probes, count, means[pages[n]], head, until, scale, is_sum)
                )
        for other in range(head + 1, until):
            scores[w, other, : end - begin] = out


def chunk_mean_scores_reference(
    keys: torch.Tensor, probes: torch.Tensor, page: int, far: range, wanted: int,
    options: ChunkMean, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Twin of :class:`ChunkMeanIndex` in plain torch, for one window.

    Args:
        keys: ``[N * P, Hk, D]`` keys of all pages of the request, in order.
        probes: ``[Hk, R, D]``.
        page: P.
        far: Logical pages to score.
        wanted: Chunks to look into.
        options: The stage.
        scale: Of the logits.

    Returns:
        ``[Hk, len(far)]`` float32.
    """
    means = keys.float().unflatten(0, (-1, page)).mean(1).bfloat16().float()  # [N, Hk, D]
    size = options.pages
    whole = [c for c in range(far.stop // size) if c * size >= far.start]

    def relevance(summaries: torch.Tensor) -> torch.Tensor:
        logits = scale * torch.einsum("nhd,hrd->hrn", summaries, probes.float())
        if options.heads == "all":
            logits = logits.flatten(0, 1)[None].expand(len(probes), -1, -1)
        return logits.mean(1) if options.reduce == "sum" else logits.amax(1)

    scores = relevance(means[far.start : far.stop])
    if wanted < len(whole):
        summaries = [means[c * size : (c + 1) * size].mean(0).bfloat16().float() for c in whole]
        ranks = relevance(torch.stack(summaries)).argsort(1, descending=True)  # [Hk, chunks]
        for head, order in enumerate(ranks.tolist()):
            for rank in order[wanted:]:
                begin = whole[rank] * size - far.start
                scores[head, begin : begin + size] = -torch.inf
    return scores
