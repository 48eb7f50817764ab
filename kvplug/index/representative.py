"""Representative keys: a page is known by the mean of its most attended keys (InfLLM).

InfLLM (Xiao et al. 2024, arXiv 2402.04617) represents a block by the keys that got the most
attention from the queries of their local region, and scores it by their dot products with the
query. The representative is settled when the page leaves the local region, and stored with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError, nearest_name
from kvplug.index.base import Index, PageIndex, read_pages
from kvplug.index.local_mass import LocalMass
from kvplug.numeric import dot_bfloat16, from_bfloat16, to_bfloat16
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace

LANES = 16
"""Floats in a vector register, to estimate work."""
PAGES_PER_TASK = 256
"""Pages scored by one thread at a time."""
CHOICES = {"metric": ("dot", "cosine"), "heads": ("each", "all"), "reduce": ("sum", "max")}


@dataclass(frozen=True)
class Representative(Index):
    """Scores are sums (or maxima) of the probes' logits with a page's representative key."""

    name = "representative"
    gives = frozenset({"logits"})
    lookahead = True

    top: int = 4
    """Keys averaged per page and KV head."""
    metric: str = "dot"
    """``dot``, on the scale of attention logits, or ``cosine``, of each probe by itself."""
    heads: str = "each"
    """``each`` KV head ranks pages by itself, or ``all`` share the sum of their scores."""
    reduce: str = "sum"
    """What is taken over the probes of a KV head: ``sum`` or ``max``."""

    def __post_init__(self) -> None:
        """Refuses what no page could be scored by."""
        if self.top < 1:
            raise KvplugError(f"index 'representative' needs top >= 1, not {self.top}.")
        for field, known in CHOICES.items():
            value = getattr(self, field)
            if value not in known:
                raise KvplugError(
                    f"index 'representative': unknown {field} {value!r}: "
                    f"{nearest_name(str(value), known)}."
                )

    def for_layer(self, layer: Layer) -> RepresentativeIndex:
        """See :meth:`Index.for_layer`."""
        return RepresentativeIndex(layer, self)


class RepresentativeIndex(PageIndex):
    """One bfloat16 vector per page and KV head: ``[pages, Hk, D]``."""

    def __init__(self, layer: Layer, options: Representative) -> None:
        """Allocates the vectors (untouched pages cost no memory)."""
        super().__init__(layer)
        self._options = options
        # Asked for here, so that it has watched a step before this index does.
        self._local = layer.own(LocalMass)
        self._reader = layer.reader
        shape = self.shape
        self._vectors = torch.zeros(
            (shape.num_pages, shape.num_kv_heads, shape.head_dim), dtype=torch.int16
        )
        self._vectors_host = self._vectors.numpy().view(np.uint16)

    @property
    def vectors(self) -> torch.Tensor:
        """``[pages, Hk, D]`` bfloat16 representative keys; of sealed pages only."""
        return self._vectors.view(torch.bfloat16)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`vectors`."""
        return (self._vectors,)

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Settles the representatives of pages.

        No later window adds to their mass, so it does not matter that the step's windows all have.
        """
        heads = self.shape.num_kv_heads
        for part, keys in read_pages(self._reader, sealed.pages, heads, workspace):
            _represent(
                keys.numel() // LANES, keys.numpy(), sealed.pages[part], self._local.mass.numpy(),
                self._options.top, self._vectors_host,
            )  # fmt: skip

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score`."""
        windows, options = step.windows, self._options
        most, dim = probes.vectors.shape[2:]
        per_page = (1 if options.reduce == "sum" else most) + 1
        _score_representatives(
            scores.numel() * per_page * dim // LANES, self._vectors_host,
            probes.vectors.numpy(), probes.counts.numpy(), step.sparse_windows,
            windows.request, windows.far_begin, windows.far_end, step.block_table_host,
            options.metric == "cosine", options.heads == "all", options.reduce == "sum",
            np.float32(self.shape.scale), scores.numpy(),
        )  # fmt: skip


@compiled()
def _represent(keys, pages, mass, top, vectors):  # type: ignore[no-untyped-def]
    """``vectors[page, head] = mean of the top keys by mass``, all of them where there is none.

    Args:
        keys: ``[n, Hk, D, P]``.
        pages: ``[n]`` physical.
        mass: ``[pages, Hk, P]``.
        top: Keys to average.
        vectors: ``[pages, Hk, D]`` bfloat16 bits.
    """
    count, num_kv_heads, dim, page = keys.shape
    for task in prange(count * num_kv_heads):
        n, head = task // num_kv_heads, task % num_kv_heads
        chosen = _heaviest(mass[pages[n], head], top)
        wanted = np.float32(chosen.sum())
        for d in range(dim):
            total = np.float32(0)
            for t in range(page):
                if chosen[t]:
                    total += keys[n, head, d, t]
            vectors[pages[n], head, d] = to_bfloat16(total / wanted)


@njit(cache=True)
def _heaviest(mass, top):  # type: ignore[no-untyped-def]
    """``[P]`` whether a key is among the ``top`` of largest mass; of equal ones the newer is."""
    page = mass.shape[0]
    if mass.max() <= 0 or top >= page:
        return np.ones(page, dtype=np.bool_)
    chosen = np.zeros(page, dtype=np.bool_)
    for _ in range(top):
        best = -1
        for t in range(page):
            if not chosen[t] and (best < 0 or mass[t] >= mass[best]):
                best = t
        chosen[best] = True
    return chosen


@compiled()
def _score_representatives(  # type: ignore[no-untyped-def]
    vectors, probes, counts, rows, request, far_begin, far_end, block_table,
    cosine, all_heads, add_probes, scale, scores,
):  # fmt: skip
    """Scores every page for every KV head, or for ``all_heads`` by the sum over them."""
    num_kv_heads, dim = vectors.shape[1:]
    most = 1 if add_probes else probes.shape[2]
    ready = np.empty((rows.shape[0], num_kv_heads, most, dim), dtype=np.float32)
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        _scale_probes(probes[w, head], counts[w], cosine, add_probes, scale, ready[w, head])
    blocks = (scores.shape[2] + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in prange(rows.shape[0] * blocks):
        w, first = task // blocks, task % blocks * PAGES_PER_TASK
        row, count = rows[w], 1 if add_probes else counts[w]
        pages = block_table[request[row], far_begin[row] + first : far_end[row]][:PAGES_PER_TASK]
        out = scores[w, :, first : first + pages.shape[0]]
        # Slices of the last but one dimension would hide from the compiler that rows have no gaps.
        _score_block(ready[w], count, vectors, pages, cosine, all_heads, out)


@njit(cache=True)
def _score_block(  # type: ignore[no-untyped-def]
    probes, count, vectors, pages, cosine, all_heads, scores
):
    """``scores [Hk, n]`` of physical ``pages [n]``: a head's largest product with a page.

    A score is NaN only where every product is, so that the pipeline can tell.
    """
    for head in range(scores.shape[0]):
        mine, out = probes[head], scores[head]
        for n in range(pages.shape[0]):
            bits = vectors[pages[n], head]
            best = dot_bfloat16(mine[0], bits)
            for r in range(1, count):
                product = dot_bfloat16(mine[r], bits)
                best = product if product > best or best != best else best
            out[n] = best
        if cosine:
            for n in range(pages.shape[0]):
                out[n] *= _inverse_root(_square_bfloat16(vectors[pages[n], head]))
    if all_heads:
        total = scores[0]
        for head in range(1, scores.shape[0]):
            total += scores[head]
        for head in range(1, scores.shape[0]):
            scores[head] = total


@njit(cache=True)
def _scale_probes(probes, count, cosine, add, scale, ready):  # type: ignore[no-untyped-def]
    """``ready`` = ``probes [R, D]`` times ``scale``, or of length one; or, to ``add``, their sum.

    The sum of dot products is the dot product with the sum.
    """
    if add:
        ready[:] = 0
    for r in range(count):
        factor = _inverse_root((probes[r] * probes[r]).sum()) if cosine else scale
        for d in range(probes.shape[1]):
            if add:
                ready[0, d] += probes[r, d] * factor
            else:
                ready[r, d] = probes[r, d] * factor


@njit(cache=True)
def _inverse_root(square):  # type: ignore[no-untyped-def]
    """One over the root; 0 for 0, so that vectors without a direction are like none."""
    return np.float32(1) / np.float32(np.sqrt(square)) if square != 0 else np.float32(0)


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def _square_bfloat16(bits):  # type: ignore[no-untyped-def]
    """``bits . bits`` for ``[D]`` bfloat16 bits; see :func:`dot_bfloat16`."""
    total = np.float32(0)
    for d in range(bits.shape[0]):
        value = from_bfloat16(bits[d])
        total += value * value
    return total


def representatives_reference(keys: torch.Tensor, mass: torch.Tensor, top: int) -> torch.Tensor:
    """Twin of the sealing of pages, in plain torch.

    Args:
        keys: ``[N, P, Hk, D]``.
        mass: ``[N, Hk, P]``.
        top: Keys to average.

    Returns:
        ``[N, Hk, D]`` float32, before it is rounded.
    """
    page = keys.shape[1]
    newest_first = mass.flip(-1)
    order = page - 1 - newest_first.argsort(dim=-1, descending=True, stable=True)
    by_head = keys.transpose(1, 2).float()  # [N, Hk, P, D]
    ranked = by_head.gather(2, order[..., None].expand_as(by_head))
    means = ranked[:, :, :top].mean(2)
    return torch.where((mass > 0).any(-1, keepdim=True), means, by_head.mean(2))


def representative_scores_reference(
    vectors: torch.Tensor, probes: torch.Tensor, options: Representative, scale: float
) -> torch.Tensor:
    """Twin of :meth:`RepresentativeIndex.score` in plain torch, for one window.

    Args:
        vectors: ``[N, Hk, D]`` representatives of the far pages in logical order.
        probes: ``[Hk, R, D]``.
        options: The stage.
        scale: Of the logits.

    Returns:
        ``[Hk, N]`` float32.
    """
    vectors, probes = vectors.float(), probes.float()
    if options.metric == "cosine":
        normal = torch.nn.functional.normalize
        vectors, probes, scale = normal(vectors, dim=-1), normal(probes, dim=-1), 1.0
    dots = scale * torch.einsum("hrd,nhd->hrn", probes, vectors)
    scores = dots.sum(1) if options.reduce == "sum" else dots.amax(1)
    return scores.sum(0).expand_as(scores) if options.heads == "all" else scores
