"""Channel codes: two bits for each of the channels in which a head's keys differ most.

Learned keys rarely equal the queries that they answer: on the bundled trained model their cosine is
0.54, and the match wins by its length times that. Signs of random planes lose it in noise: with 64
bits the right page is among the best 16 of 1,000 in 36% of cases. What tells keys apart lies in few
channels (Double Sparsity, Yang et al. 2024, arXiv 2408.07092, reads a few heavy channels of every
key). So of every KV head the channels with the largest variance are kept, each as two bits: the
sign of its deviation from the mean, and whether that is more than one standard deviation. The same
64 bits, of 32 channels, then find the page in 89% of cases, and 128 bits, of 64, in 96%.

A probe is not reduced to bits. A code stands for deviations of -3/2, -1/2, 1/2 or 3/2, which is
``sign + extreme / 2`` with both bits as +-1, so its product with a probe is a weighted sum of bits;
weights are whole numbers of :data:`PLANES` bits, and the sum is counted plane by plane. A page's
logit is that of its best token.

Means, deviations and the choice of channels are those of a context's first tokens, at most a window
of them, read back from the cache when the context is first retrieved from. They belong to its first
page. A prefix hit ends at whole windows, so contexts that share that page share those tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.index.base import Index, PageIndex, in_turns, read_pages
from kvplug.index.shares import LOG2_E, OPERATIONS, sum_shares
from kvplug.numeric import popcount
from kvplug.stage import Layer, Scratch

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace

BITS = (64, 128)
PLANES = 3
"""Bits of a probe's weights: 3 find as much as floats do, 2 lose a little."""
NEARLY_HALF = np.float32(0.4995)
"""Rounds weights: half of the largest weight is 3.5, which must not be left to the last bit."""
LANES = 16
"""Floats in a vector register, to estimate work."""
WORDS_PER_VECTOR = 8
"""64-bit words in a vector register, to estimate work."""
PAGES_PER_TASK = 256
"""Pages scored by one thread at a time."""


@dataclass(frozen=True)
class Channels(Index):
    """Scores are logarithms of estimated attention shares of far pages, summed over probes."""

    name = "channels"
    gives = frozenset({"logits"})

    bits: int = 128
    """Of a token's code, per KV head: 64 or 128, two for each channel."""

    def __post_init__(self) -> None:
        """Refuses other sizes."""
        if self.bits not in BITS:
            raise KvplugError(f"Index 'channels' needs bits 64 or 128, not {self.bits}.")

    def for_layer(self, layer: Layer) -> ChannelsIndex:
        """See :meth:`Index.for_layer`."""
        return ChannelsIndex(self, layer)


class ChannelsIndex(PageIndex):
    """Codes ``[pages, Hk, words, P]``, and what they mean on the first page of each request.

    Args:
        options: The stage.
        layer: The layer.
    """

    def __init__(self, options: Channels, layer: Layer) -> None:
        """Allocates (untouched pages cost no memory)."""
        super().__init__(layer)
        shape, self._reader = self.shape, layer.row_reader
        self._scratch = layer.shared(Scratch).workspace
        pages, heads = shape.num_pages, shape.num_kv_heads
        self.channels = min(options.bits // 2, shape.head_dim)
        """C."""
        self._codes = torch.zeros((pages, heads, options.bits // 64, shape.page), dtype=torch.int64)
        self._chosen = torch.zeros((pages, heads, self.channels), dtype=torch.int16)
        self._scales = torch.zeros((pages, heads, 2, self.channels))
        self._codes_host = self._codes.numpy().view(np.uint64)
        self._chosen_host, self._scales_host = self._chosen.numpy(), self._scales.numpy()
        tokens = min(shape.window, shape.local)
        self.first_pages = max(tokens // shape.page, 1)
        """Pages of a request that say which channels matter: all are written before any page can
        be retrieved."""

    @property
    def codes(self) -> torch.Tensor:
        """``[pages, Hk, words, P]`` int64: C sign bits of a token, then C of extremes."""
        return self._codes

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Codes; channels, means and deviations on first pages."""
        return (self._codes, self._chosen, self._scales)

    def nbytes(self) -> float:
        """With one request that fills the cache: a request takes one page's channels."""
        return self._codes.nbytes + self._chosen[0].nbytes + self._scales[0].nbytes

    def begin(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Chooses channels by the first tokens of contexts."""
        heads = self.shape.num_kv_heads
        for request in sealed.begun:
            pages = step.block_table_host[request, : self.first_pages]
            rows = (pages[:, None].astype(np.int64) * heads + np.arange(heads)).ravel()
            keys = self._reader.read(torch.from_numpy(rows), workspace)
            _choose(
                keys.numel() // LANES, keys.unflatten(0, (-1, heads)).numpy(), pages[0],
                self._chosen_host, self._scales_host,
            )  # fmt: skip

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Encodes the pages' keys by their context's channels."""
        owners = np.repeat(step.windows.request, np.diff(sealed.starts))
        firsts = step.block_table_host[owners, 0]
        for part, keys in read_pages(
            self._reader, sealed.pages, self.shape.num_kv_heads, workspace
        ):
            _encode(
                keys.numel() // 4, keys.numpy(), sealed.pages[part], firsts[part],
                self._chosen_host, self._scales_host, self._codes_host,
            )  # fmt: skip

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score` and the stage."""
        windows, counts, rows = step.windows, probes.counts.numpy(), step.sparse_windows
        vectors = probes.vectors.numpy()
        shape = *vectors.shape[:3], self._codes.shape[2], PLANES + 1
        asked = self._scratch.take("channels.asked", shape, torch.int64).numpy().view(np.uint64)
        units = self._scratch.take("channels.units", vectors.shape[:3], torch.float32).numpy()
        _weigh(
            vectors.size, vectors, counts, rows, windows.request, step.block_table_host,
            self._chosen_host, self._scales_host, np.float32(self.shape.scale) * LOG2_E,
            asked, units,
        )  # fmt: skip
        work = max(PLANES * self._codes.shape[2] * self.shape.page // WORDS_PER_VECTOR, 1)
        found, (most, pages) = scores.numpy(), (vectors.shape[2], scores.shape[2])
        num, heads = vectors.shape[:2]
        for part in in_turns(num, heads * most * pages * 4):
            shape = part.stop - part.start, heads, most, pages
            logits = self._scratch.take("channels.logits", shape, torch.float32).numpy()
            _score_pages(
                logits.size * work, self._codes_host, asked[part], units[part], counts[part],
                rows[part], windows.request, windows.far_begin, windows.far_end,
                step.block_table_host, logits,
            )  # fmt: skip
            sum_shares(
                logits.size * OPERATIONS // LANES, logits, counts[part], rows[part],
                windows.far_begin, windows.far_end, found[part],
            )  # fmt: skip


@compiled()
def _choose(keys, place, chosen, scales):  # type: ignore[no-untyped-def]
    """Channels, means and deviations of ``keys [m, Hk, P, D]``, written to page ``place``.

    Rotary embeddings turn channels ``d`` and ``d + D/2`` into each other, so what they vary is
    counted for both.
    """
    pages, heads, page, dim = keys.shape
    for head in prange(heads):
        mean, variance = np.zeros(dim, np.float32), np.zeros(dim, np.float32)
        for n in range(pages):
            for t in range(page):
                for d in range(dim):
                    mean[d] += keys[n, head, t, d]
        mean /= np.float32(pages * page)
        for n in range(pages):
            for t in range(page):
                for d in range(dim):
                    delta = keys[n, head, t, d] - mean[d]
                    variance[d] += delta * delta
        variance /= np.float32(pages * page)
        rank = np.empty(dim, np.float32)
        for d in range(dim):
            rank[d] = variance[d] + variance[(d + dim // 2) % dim]
        for c in range(chosen.shape[2]):
            best = np.argmax(rank)
            rank[best] = -1
            chosen[place, head, c] = best
            scales[place, head, 0, c] = mean[best]
            scales[place, head, 1, c] = np.sqrt(variance[best])


@compiled()
def _encode(keys, pages, firsts, chosen, scales, codes):  # type: ignore[no-untyped-def]
    """``codes[pages[n], head] = the code of keys[n, head] [P, D]``, by page ``firsts[n]``."""
    heads, page = keys.shape[1:3]
    channels = chosen.shape[2]
    for task in prange(pages.shape[0] * heads):
        n, head = task // heads, task % heads
        mine, (mean, deviation) = chosen[firsts[n], head], scales[firsts[n], head]
        for t in range(page):
            key, low, high = keys[n, head, t], np.uint64(0), np.uint64(0)
            for c in range(channels):
                delta = key[mine[c]] - mean[c]
                sign, extreme = delta > 0, (abs(delta) > deviation[c]) == (delta > 0)
                low |= np.uint64(sign) << np.uint64(c)
                high |= np.uint64(extreme) << np.uint64(c)
            out = codes[pages[n], head]
            if out.shape[0] == 1:
                out[0, t] = low | high << np.uint64(channels)
            else:
                out[0, t], out[1, t] = low, high


@compiled()
def _weigh(  # type: ignore[no-untyped-def]
    vectors, counts, rows, request, block_table, chosen, scales, factor, asked, units
):
    """What each probe asks of codes: signs, then the planes of its weights; and a weight's unit.

    ``units * (2 * sum of weights of bits that agree - sum of all weights)`` is the logit, in units
    of ln 2. A probe that is not finite has a unit that is not.
    """
    heads, words, channels = vectors.shape[1], asked.shape[3], chosen.shape[2]
    for task in prange(vectors.shape[0] * heads):
        w, head = task // heads, task % heads
        place = block_table[request[rows[w]], 0]
        mine, deviation = chosen[place, head], scales[place, head, 1]
        for r in range(counts[w]):
            probe, out = vectors[w, head, r], asked[w, head, r]
            most = np.float32(0)
            for c in range(channels):
                weight = abs(probe[mine[c]] * deviation[c])
                most = weight if weight > most or weight != weight else most
            unit = most / np.float32(2**PLANES - 1)
            units[w, head, r] = factor * unit
            inverse = np.float32(1) / unit if unit > 0 else np.float32(0)
            out[:] = 0
            for c in range(channels):
                weight = probe[mine[c]] * deviation[c]
                for half in range(2):
                    bit = c + half * channels
                    word, place_in = bit // 64, np.uint64(bit % 64)
                    if words == 2:
                        word, place_in = half, np.uint64(c)
                    size = abs(weight) * inverse * np.float32(1 - 0.5 * half)
                    whole = np.int64(size + NEARLY_HALF) if size < 2**PLANES else 0
                    out[word, 0] |= np.uint64(weight > 0) << place_in
                    for plane in range(PLANES):
                        out[word, 1 + plane] |= np.uint64(whole >> plane & 1) << place_in


@njit(cache=True, inline="always")
def _weight(word, asked):  # type: ignore[no-untyped-def]
    """Sum of the weights of the bits in which a word agrees; ``asked [PLANES + 1]``."""
    agree = ~(word ^ asked[0])
    ones, twos, fours = agree & asked[1], agree & asked[2], agree & asked[3]
    return popcount(ones) + 2 * popcount(twos) + 4 * popcount(fours)


@njit(cache=True)
def _most_of_one(code, asked):  # type: ignore[no-untyped-def]
    """The largest weight that a token of the page has; ``code [P]``.

    A loop over one array, which the compiler runs on vectors: 12 ns for a page of 32 tokens, where
    a loop over words inside that over tokens takes 80.
    """
    best = np.int64(0)
    for t in range(code.shape[0]):
        best = max(best, _weight(code[t], asked))
    return best


@njit(cache=True)
def _most_of_two(low, high, asked_low, asked_high):  # type: ignore[no-untyped-def]
    """The same of codes of two words."""
    best = np.int64(0)
    for t in range(low.shape[0]):
        best = max(best, _weight(low[t], asked_low) + _weight(high[t], asked_high))
    return best


@compiled()
def _score_pages(  # type: ignore[no-untyped-def]
    codes, asked, units, counts, rows, request, far_begin, far_end, block_table, logits
):
    """``logits[w, h, r, n]`` of the best token of each page, in units of ln 2."""
    num_windows, num_kv_heads = logits.shape[:2]
    blocks = (logits.shape[3] + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in prange(num_windows * blocks):
        w, first = task // blocks, task % blocks * PAGES_PER_TASK
        row = rows[w]
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        for n in range(first, min(first + PAGES_PER_TASK, pages.shape[0])):
            for head in range(num_kv_heads):
                code = codes[pages[n], head]
                for r in range(counts[w]):
                    probe = asked[w, head, r]
                    if code.shape[0] == 1:
                        most = _most_of_one(code[0], probe[0])
                    else:
                        most = _most_of_two(code[0], code[1], probe[0], probe[1])
                    # The sum of all weights is the same for every page, so it is left out.
                    logits[w, head, r, n] = units[w, head, r] * np.float32(2 * most)


def channel_codes_reference(
    first: torch.Tensor, keys: torch.Tensor, channels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of :meth:`ChannelsIndex.begin` and :meth:`ChannelsIndex.seal` in plain torch.

    Args:
        first: ``[m, Hk, D]`` the context's first keys.
        keys: ``[T, Hk, D]`` keys to encode.
        channels: C.

    Returns:
        ``[Hk, C]`` channels; ``[Hk, C]`` their deviations; ``[T, Hk, C]`` codes as the deviations
        from the mean that they stand for, -1.5 to 1.5.
    """
    mean, variance = first.mean(0), first.var(0, unbiased=False)  # [Hk, D]
    half = variance.shape[1] // 2
    rank = variance + variance.roll(-half, 1)
    chosen = rank.argsort(dim=1, descending=True, stable=True)[:, :channels]
    deviation = variance.gather(1, chosen).sqrt()
    index = chosen.expand(len(keys), -1, -1)
    delta = keys.gather(2, index) - mean.gather(1, chosen)
    sign, extreme = torch.where(delta > 0, 1.0, -1.0), delta.abs() > deviation
    return chosen, deviation, sign * torch.where(extreme, 1.5, 0.5)


def channel_logits_reference(
    chosen: torch.Tensor, deviation: torch.Tensor, codes: torch.Tensor, probes: torch.Tensor,
    page: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Twin of the logits that :meth:`ChannelsIndex.score` makes shares of, for one window.

    Args:
        chosen: ``[Hk, C]``.
        deviation: ``[Hk, C]``.
        codes: ``[N * P, Hk, C]`` of the far pages, in logical order.
        probes: ``[Hk, R, D]``.
        page: P.
        scale: Of the layer's logits.

    Returns:
        ``[Hk, R, N]`` float64 in units of ln 2, each probe's less a constant.
    """
    index = chosen[:, None].expand(-1, probes.shape[1], -1)
    weights = (probes.gather(2, index) * deviation[:, None]).double()  # [Hk, R, C]
    unit = weights.abs().amax(2, keepdim=True) / (2**PLANES - 1)
    # A code is its sign and half the bit that says whether sign and extremity agree.
    signs = codes.sign()
    extremes = 2 * (codes - signs)
    whole = (weights.abs() / unit + float(NEARLY_HALF)).floor() * weights.sign()
    halves = (weights.abs() / unit / 2 + float(NEARLY_HALF)).floor() * weights.sign()
    products = torch.einsum("hrc,thc->hrt", whole, signs.double())
    products += torch.einsum("hrc,thc->hrt", halves, extremes.double())
    return (products * unit * scale / math.log(2)).unflatten(2, (-1, page)).amax(3)
