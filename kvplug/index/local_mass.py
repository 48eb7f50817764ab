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
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.index.local_softmax import BIG, LANES, TILE, exponentials, page_logits
from kvplug.stage import Layer, Memory, Passage

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace

EVERY = 32
"""Queries per sampled one. A whole window always ends in a sampled query: where the window is not
a multiple of this, their greatest common divisor takes its place."""
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
        self._reader = layer.reader
        self.mass = torch.zeros((shape.num_pages, shape.num_kv_heads, shape.page))
        """``[pages, Hk, P]`` float32: probabilities added over sampled queries and query heads."""
        self.seen = torch.zeros((shape.num_pages, shape.num_kv_heads), dtype=torch.int32)
        """``[pages, Hk]``: absolute position of the first query that has not contributed yet."""
        self._mass_host, self._seen_host = self.mass.numpy(), self.seen.numpy()

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.mass, self.seen)

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Forgets the mass of what the slots held."""
        _forget(slots.numpy(), self._mass_host, self._seen_host)

    def watch(self, passage: Passage) -> None:
        """Adds what the step's sampled queries give to the keys of their local regions."""
        step, workspace, shape = passage.step, passage.workspace, self.shape
        stream = step.stream
        first_row = workspace.take("local_mass.first_row", (len(stream),), torch.int32).numpy()
        pages = _count_local_pages(
            stream.request, stream.num_tokens, stream.context_end, stream.far_end,
            self.every, shape.page, first_row,
        )  # fmt: skip
        if pages == 0:
            return
        # Requests that share a page must contribute in the order of their positions.
        sampled = np.flatnonzero(first_row >= 0)
        first = stream.context_end[sampled] - stream.num_tokens[sampled]
        order = sampled[np.argsort(first, kind="stable")]
        keys = self._read(step, order, first_row, pages, workspace)
        counted = int(stream.num_tokens[order].sum()) // self.every + len(order)
        local_keys = pages * shape.page // len(order) + 1
        _add_mass(
            counted * shape.num_heads * shape.head_dim * local_keys // LANES,
            passage.queries.numpy(), keys, order, first_row,
            stream.request, stream.token_start, stream.num_tokens, stream.context_end,
            stream.far_end, step.block_table_host,
            self.every, np.float32(shape.scale * LOG2_E), self._mass_host, self._seen_host,
        )  # fmt: skip

    def _read(
        self, step: Step, order: np.ndarray, first_row: np.ndarray, pages: int, workspace: Workspace
    ) -> np.ndarray:
        """``[Hk, pages, D, P]`` float32 keys of the step's local pages."""
        shape, stream = self.shape, step.stream
        rows = workspace.take("local_mass.rows", (shape.num_kv_heads, pages), torch.int64)
        _list_rows(
            order, first_row, stream.request, stream.context_end, stream.far_end,
            step.block_table_host, shape.page, rows.numpy(),
        )  # fmt: skip
        keys = self._reader.read(rows.view(-1), workspace)
        return keys.view(shape.num_kv_heads, pages, shape.head_dim, shape.page).numpy()


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
def _count_local_pages(  # type: ignore[no-untyped-def]
    request, num_tokens, context_end, far_end, every, page, first_row
):
    """Pages to read: the local regions of windows with sampled queries, once per request.

    ``first_row[s]`` becomes the place of window ``s``'s first local page among them, or -1.
    """
    pages = 0
    run_request, run_first, run_row, run_end = -1, 0, 0, 0
    for s in range(request.shape[0]):
        first_row[s] = -1
        if context_end[s] // every == (context_end[s] - num_tokens[s]) // every:
            continue
        if request[s] != run_request:
            run_request, run_first, run_row, run_end = request[s], far_end[s], pages, far_end[s]
        first_row[s] = run_row + far_end[s] - run_first
        last = (context_end[s] + page - 1) // page
        pages += max(last - run_end, 0)
        run_end = max(last, run_end)
    return pages


@njit(cache=True)
def _list_rows(  # type: ignore[no-untyped-def]
    order, first_row, request, context_end, far_end, block_table, page, rows
):
    """``rows[head, row] = physical page * Hk + head``; rows of no window get page 0."""
    num_kv_heads = rows.shape[0]
    rows[:] = 0
    for s in order:
        last = (context_end[s] + page - 1) // page
        for n in range(far_end[s], last):
            physical = np.int64(block_table[request[s], n])
            for head in range(num_kv_heads):
                rows[head, first_row[s] + n - far_end[s]] = physical * num_kv_heads + head


@compiled(fastmath={"contract"})
def _add_mass(  # type: ignore[no-untyped-def]
    queries, keys, order, first_row, request, token_start, num_tokens, context_end, far_end,
    block_table, every, scale, mass, seen,
):  # fmt: skip
    """Adds the probabilities of all windows, in order; heads are apart."""
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
        for s in order:
            first, start = context_end[s] - num_tokens[s], far_end[s] * page
            count = 0
            for position in range(first // every * every + every - 1, context_end[s], every):
                token = token_start[s] + position - first
                for h in range(head * group, (head + 1) * group):
                    for d in range(dim):
                        rows[count, d] = queries[token, h, d] * scale
                    visible[count] = max(position + 1 - start, 0)
                    count += 1
            pages = block_table[request[s], far_end[s] : (context_end[s] + page - 1) // page]
            page_logits(rows[:count], visible[:count], keys[head, first_row[s] :], logits)
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
