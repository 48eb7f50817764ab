"""Local attention mass: how much attention every key got from the queries just behind it.

InfLLM (Xiao et al. 2024, arXiv 2402.04617) adds up, per key, the attention probabilities that the
queries of its local region give it, and picks a block's representative keys by them. Deviations:

* the softmax runs over the local region alone, not over local and retrieved keys together, so the
  mass does not depend on what was retrieved;
* only every :data:`EVERY`-th query of a request counts, by its absolute position, so that most
  decode steps cost nothing;
* query heads of one KV head are added up.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.index.local_softmax import BIG, LANES, TILE, exponentials, page_logits
from kvplug.stage import Layer, Memory, Passage

EVERY = 32
"""Queries per sampled one. A whole window always ends in a sampled query: where the window is not
a multiple of this, their greatest common divisor takes its place."""
MOST_PAGES = 256
"""Pages whose keys are read at once; a chunk of 4,096 tokens has 144 of 32 tokens."""
LOG2_E = math.log2(math.e)


class LocalMass(Memory):
    """Accumulated local attention of every slot: ``[pages, Hk, P]``.

    A stage that reads it must set ``lookahead``: a page's mass is complete once the page has left
    the local region of its request's newest window. Requests that share the page through a prefix
    hit may compute some of those windows again; what they would add was added before.
    """

    def __init__(self, layer: Layer) -> None:
        """Allocates (untouched pages cost no memory).

        Raises:
            KvplugError: Keys cannot be read back from this cache.
        """
        super().__init__(layer)
        shape = self.shape
        self.every = math.gcd(EVERY, shape.window)
        self._reader = layer.cached_reader
        self.mass = torch.zeros((shape.num_pages, shape.num_kv_heads, shape.page))
        """``[pages, Hk, P]`` float32: probabilities added over sampled queries and query heads."""
        self.seen = torch.zeros((shape.num_pages, shape.num_kv_heads), dtype=torch.int32)
        """``[pages, Hk]``: absolute position of the first query that has not contributed yet."""
        self._place = np.full(shape.num_pages, -1, np.int32)
        self._mass_host, self._seen_host = self.mass.numpy(), self.seen.numpy()

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.mass, self.seen)

    def forget(self, slots: torch.Tensor) -> None:
        """Forgets the mass of what the slots held."""
        _forget(slots.numpy(), self._mass_host, self._seen_host)

    def watch(self, passage: Passage) -> None:
        """Adds what the step's sampled queries give to the keys of their local regions."""
        stream = passage.step.stream
        order = np.empty(len(stream), np.int64)
        count = _find_sampled(stream.num_tokens, stream.context_end, self.every, order)
        if count == 0:
            return
        # Requests that share a page must contribute in the order of their positions.
        order = order[:count]
        first = stream.context_end[order] - stream.num_tokens[order]
        order = order[np.argsort(first, kind="stable")]
        while len(order):
            order = order[self._add(passage, order) :]

    def _add(self, passage: Passage, order: np.ndarray) -> int:
        """Adds what windows give, in ``order``, as far as their pages can be read at once.

        Returns:
            How many of them.
        """
        step, workspace, shape = passage.step, passage.workspace, self.shape
        stream, heads = step.stream, shape.num_kv_heads
        listed = workspace.take("local_mass.listed", (shape.num_pages,), torch.int32).numpy()
        windows, pages = _list_pages(
            order, stream.request, stream.context_end, stream.far_end, step.block_table_host,
            shape.page, MOST_PAGES, self._place, listed,
        )  # fmt: skip
        listed = listed[:pages]
        rows = workspace.take("local_mass.rows", (heads, pages), torch.int64)
        rows.numpy()[:] = np.arange(heads)[:, None]
        rows.numpy()[:] += listed * np.int64(heads)
        keys = self._reader.read(rows.view(-1), workspace)
        sampled = _sampled_tokens(
            order[:windows], stream.token_start, stream.num_tokens, stream.context_end, self.every
        )
        queries = passage.cached_queries_at(torch.from_numpy(sampled))
        _add_mass(
            queries.numel() * (pages * shape.page // windows + 1) // LANES, queries.numpy(),
            keys.view(heads, pages, shape.head_dim, shape.page).numpy(),
            order[:windows], self._place, stream.request, stream.num_tokens,
            stream.context_end, stream.far_end, step.block_table_host,
            self.every, np.float32(shape.scale * LOG2_E), self._mass_host, self._seen_host,
        )  # fmt: skip
        self._place[listed] = -1
        return windows


@njit(cache=True)
def _forget(slots, mass, seen):  # type: ignore[no-untyped-def]
    """Clears slots; a page whose first slot is written has seen no query."""
    num_kv_heads, page = mass.shape[1:]
    for token in range(slots.shape[0]):
        slot = slots[token]
        if slot < 0:
            continue
        for head in range(num_kv_heads):
            mass[slot // page, head, slot % page] = 0
            if slot % page == 0:
                seen[slot // page, head] = 0


@njit(cache=True)
def _find_sampled(num_tokens, context_end, every, found):  # type: ignore[no-untyped-def]
    """Lists the windows with a query at the end of a run of ``every``; returns how many."""
    count = 0
    for s in range(num_tokens.shape[0]):
        if context_end[s] // every > (context_end[s] - num_tokens[s]) // every:
            found[count] = s
            count += 1
    return count


@njit(cache=True)
def _sampled_tokens(  # type: ignore[no-untyped-def]
    order, token_start, num_tokens, context_end, every
):
    """Tokens of the step whose queries count, window by window in ``order``."""
    found, count = np.empty(num_tokens[order].sum() // every + len(order), np.int64), 0
    for s in order:
        first = context_end[s] - num_tokens[s]
        for position in range(first // every * every + every - 1, context_end[s], every):
            found[count] = token_start[s] + position - first
            count += 1
    return found[:count]


@njit(cache=True)
def _list_pages(  # type: ignore[no-untyped-def]
    order, request, context_end, far_end, block_table, page, most, place, listed
):
    """Lists the local pages of windows, each once, as long as they are at most ``most``.

    Args:
        order: ``[W]`` windows.
        request: With the next three, of the stream.
        context_end: See there.
        far_end: See there.
        block_table: ``[B, max_pages]``.
        page: P.
        most: Pages, unless the first window alone has more.
        place: ``[pages]``, -1: becomes the place of a page in the list.
        listed: Becomes the list.

    Returns:
        Windows whose pages are listed, at least one, and pages.
    """
    count = 0
    for w in range(order.shape[0]):
        s = order[w]
        last = (context_end[s] + page - 1) // page
        if w > 0 and count + last - far_end[s] > most:
            return w, count
        for n in range(far_end[s], last):
            physical = block_table[request[s], n]
            if place[physical] < 0:
                place[physical] = count
                listed[count] = physical
                count += 1
    return order.shape[0], count


@compiled(fastmath={"contract"})
def _add_mass(  # type: ignore[no-untyped-def]
    queries, keys, order, place, request, num_tokens, context_end, far_end,
    block_table, every, scale, mass, seen,
):  # fmt: skip
    """Adds the probabilities of all windows, in order; heads are apart.

    ``queries [n, H, D]`` are those of :func:`_sampled_tokens`.
    """
    num_kv_heads, _, dim, page = keys.shape
    group = queries.shape[1] // num_kv_heads
    most_rows, most_keys = 0, 0
    for s in order:
        sampled = context_end[s] // every - (context_end[s] - num_tokens[s]) // every
        most_rows = max(most_rows, sampled * group)
        most_keys = max(most_keys, context_end[s] - far_end[s] * page)
    for head in prange(num_kv_heads):
        rows = np.empty((most_rows, dim), dtype=np.float32)
        visible = np.empty(most_rows, dtype=np.int64)
        # The last page ends behind the last key, and the last tile behind that.
        logits = np.empty((most_rows, most_keys + page + TILE), dtype=np.float32)
        token = 0
        for s in order:
            first, start = context_end[s] - num_tokens[s], far_end[s] * page
            count = 0
            for position in range(first // every * every + every - 1, context_end[s], every):
                for h in range(head * group, (head + 1) * group):
                    for d in range(dim):
                        rows[count, d] = queries[token, h, d] * scale
                    visible[count] = max(position + 1 - start, 0)
                    count += 1
                token += 1
            pages = block_table[request[s], far_end[s] : (context_end[s] + page - 1) // page]
            page_logits(rows[:count], visible[:count], keys[head], place[pages], logits)
            _add_window(
                logits, visible[:count], pages, head, first, context_end[s], mass, seen
            )  # fmt: skip


@njit(cache=True, fastmath={"contract"})
def _add_window(  # type: ignore[no-untyped-def]
    logits, visible, pages, head, first, end, mass, seen
):
    """Adds one window's probabilities to those of its local pages that have not got them yet."""
    page = mass.shape[2]
    weight = np.empty(visible.shape[0], dtype=np.float32)
    for r in range(visible.shape[0]):
        weight[r] = exponentials(logits[r], visible[r], page)
    for n in range(pages.shape[0]):
        if first < seen[pages[n], head]:
            continue
        seen[pages[n], head] = end
        total = mass[pages[n], head]
        for r in range(visible.shape[0]):
            if visible[r] > n * page:
                share, factor = logits[r, n * page : (n + 1) * page], weight[r]
                for t in range(page):
                    total[t] += share[t] * factor


def local_mass_reference(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    """Twin of what one window adds, in plain torch.

    Args:
        queries: ``[n, H, D]`` the window's sampled queries.
        keys: ``[T, Hk, D]`` keys of the context up to the window's end.
        positions: ``[n]`` absolute positions of the queries.
        start: Position of the first local key.
        scale: Of the logits.

    Returns:
        ``[T, Hk]``.
    """
    tokens, heads = keys.shape[:2]
    grouped = queries.unflatten(1, (heads, -1))  # [n, Hk, G, D]
    logits = torch.einsum("nhgd,thd->nhgt", grouped, keys) * scale
    place = torch.arange(tokens)
    local = (place >= start) & (place <= positions[:, None])
    allowed = local[:, None, None] & (logits.abs() <= float(BIG))
    weights = logits.where(allowed, -torch.inf).softmax(-1)
    return weights.where(allowed, 0.0).sum((0, 2)).T
