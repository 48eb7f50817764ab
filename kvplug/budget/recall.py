"""Recall budget: as many pages as it takes to hold a share of exact attention, found by audits.

Now and then a window's last query attends to everything, on the side, and the fewest pages that
would have held ``target`` of its mass, in the order of the index's scores, are what the windows
behind it get, with a margin. Nothing is estimated from scores, so it works with any index; where
an index ranks badly, it costs pages instead of answers. The user's budget is the most that a
window gets.

What was found is carried on the request's own pages (:mod:`kvplug.carry`), by KV head and layer, so
a request gets the same pages whatever it shares a batch with. No source: kvplug's own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from kvplug.budget.base import Budget
from kvplug.carry import NOWHERE, carried
from kvplug.errors import KvplugError
from kvplug.exact_mass import ExactAttention
from kvplug.stage import Layer, Memory

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace

UNKNOWN = np.float32(-1)
"""Pages that a head needs, before the first audit of its request."""
LEAST = 4
"""Pages that every window gets, or its budget where that is less."""
DECAY = 0.25
"""How far a need falls towards a smaller one that an audit finds; it rises at once."""


@dataclass(frozen=True)
class RecallBudget(Budget):
    """Pages that hold ``target`` of exact attention, up to the budget."""

    name = "recall"
    varies = True
    audits = True
    needs = MappingProxyType({"best first": "to know how many pages hold the target"})

    target: float = 0.99
    """Share of exact attention, sinks and local pages included, mean over a group's queries."""
    every: int = 8
    """Audited: each prompt window whose number this divides, and a decoded token per window."""
    margin: float = 1.5
    """Times the pages that the audit asks for; the windows behind it are not the audited one."""

    def __post_init__(self) -> None:
        """Refuses what no number of pages can hold."""
        if not 0 < self.target <= 1:
            raise KvplugError(f"recall budget needs 0 < target <= 1, not {self.target}.")
        if self.every < 1:
            raise KvplugError(f"recall budget needs every >= 1, not {self.every}.")
        if not 1 <= self.margin <= 100:
            raise KvplugError(f"recall budget needs 1 <= margin <= 100, not {self.margin}.")

    def for_layer(self, layer: Layer) -> Budget:
        """See :meth:`Budget.for_layer`."""
        shape = layer.shape
        exact = ExactAttention(layer.reader, shape.scale, shape.softcap)
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Bound(**own, exact=exact, known=layer.own(Needs))

    def pages(self, budget: int, page: int) -> int:
        """See :meth:`Budget.pages`."""
        return budget // page


class Needs(Memory):
    """Pages that a layer's KV heads need, by what audits of the context found up to a window."""

    def __init__(self, layer: Layer) -> None:
        """Allocates; pages of which nothing is kept cost no memory."""
        super().__init__(layer)
        self.needs = torch.zeros(self.shape.num_pages, self.shape.num_kv_heads)
        """``[pages, Hk]``."""
        self.host = self.needs.numpy()

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`needs`."""
        return (self.needs,)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bound(RecallBudget):
    """The budget of one layer."""

    exact: ExactAttention
    known: Needs

    def count(
        self, scores: torch.Tensor, queries: torch.Tensor, step: Step, counts: torch.Tensor,
        workspace: Workspace,
    ) -> None:  # fmt: skip
        """See :meth:`Budget.count`."""
        windows, rows, shape = step.windows, step.sparse_windows, self.known.shape
        audited = np.zeros(len(rows), np.bool_)
        found = np.zeros(tuple(counts.shape), np.int32)
        _choose(
            rows, windows.num_tokens, windows.context_end, step.prefills, self.every,
            shape.window, audited,
        )  # fmt: skip
        for w in np.flatnonzero(audited):
            found[w] = self._needed(scores[w], queries, step, int(rows[w]))
        _spread(
            rows, windows.request, windows.num_tokens, windows.context_end, step.prefills,
            windows.far_begin, step.block_table_host,
            (shape.window, shape.page, shape.local, shape.dense_below, self.margin), audited, found,
            self.known.host, counts.numpy(),
        )  # fmt: skip

    def _needed(self, scores: torch.Tensor, queries: torch.Tensor, step: Step, s: int) -> list[int]:
        """Pages that each KV head needs for the last query of window ``s``.

        Args:
            scores: ``[Hk, N]``.
            queries: ``[T, H, D]`` of the step.
            step: The step.
            s: A sparse window.
        """
        windows, shape = step.windows, self.known.shape
        context, pages = int(windows.context_end[s]), step.pages_of(s, shape.page)
        far = slice(int(windows.far_begin[s]), int(windows.far_end[s]))
        needed, target = [], step.target(s, self.target)
        for head, group in enumerate(step.last_queries(queries, s, shape.num_kv_heads)):
            rows = pages * shape.num_kv_heads + head
            shares = self.exact.shares(group, rows, context).mean(0)
            needed.append(fewest(scores[head, : far.stop - far.start], shares[far], target))
        return needed


def fewest(scores: torch.Tensor, shares: torch.Tensor, target: float) -> int:
    """How many far pages, best scores first, it takes for everything attended to hold ``target``.

    Args:
        scores: ``[N]``; what is not finite comes last, of equals the newest first, as in
            :class:`kvplug.select.top_pages.TopPages`.
        shares: ``[N]`` of exact attention; sinks and local pages have the rest of 1.
        target: The share to hold.
    """
    ranks = torch.where(scores.isfinite(), scores, -torch.inf).double().numpy()
    order = np.lexsort((-np.arange(len(ranks)), -ranks))
    # What is left out may weigh 1 - target: summed from the end, it is exact where it is small.
    left_out = np.cumsum(shares.numpy()[order][::-1])
    return len(ranks) - int(np.searchsorted(left_out, 1 - target, side="right"))


@njit(cache=True)
def _choose(  # type: ignore[no-untyped-def]
    rows, num_tokens, context_end, prefills, every, window, audited
):
    """Marks the windows to audit, by their place in the request alone."""
    for w in range(rows.shape[0]):
        s = rows[w]
        first = context_end[s] - num_tokens[s]
        if prefills[s]:
            audited[w] = first // window % every == 0
        else:
            audited[w] = first % window == 0


@njit(cache=True)
def _is_known(source, far_begin, wanted, page, local, dense_below):  # type: ignore[no-untyped-def]
    """Whether the window that begins at ``source`` was sparse, so that its pages hold a need."""
    if source < 0:
        return False
    far = (source + 1 - local) // page - far_begin
    return source + 1 > dense_below and far > wanted


@njit(cache=True)
def _spread(  # type: ignore[no-untyped-def]
    rows, request, num_tokens, context_end, prefills, far_begin, block_table, sizes, audited, found,
    needs, counts,
):  # fmt: skip
    """Takes audits in, carries needs from window to window, and writes ``counts``."""
    window, page, local, dense_below, margin = sizes
    for w in range(rows.shape[0]):
        s = rows[w]
        end = context_end[s]
        first = end - num_tokens[s]
        before, here, also = carried(first, end, prefills[s], window, page)
        pages = block_table[request[s]]
        source = first // window * window
        if prefills[s] or first % window == 0:
            source -= window
        for head in range(counts.shape[1]):
            wanted = counts[w, head]
            need = UNKNOWN
            if _is_known(source, far_begin[s], wanted, page, local, dense_below):
                need = needs[pages[before], head]
            if audited[w]:
                now = np.float32(min(found[w, head], wanted))
                falls = need + (now - need) * np.float32(DECAY)
                need = max(now, falls) if need >= 0 else now
            if here != NOWHERE:
                needs[pages[here], head] = need
                needs[pages[also], head] = need
            if need >= 0:
                pages_now = max(np.int64(np.ceil(need * margin)), LEAST)
                counts[w, head] = max(min(pages_now, wanted), 1)


def needs_reference(found: list[int | None], wanted: int) -> list[float | None]:
    """Twin of how needs go from window to window, in plain Python.

    Args:
        found: What each window's audit found, None where there was none.
        wanted: The budget, in pages.

    Returns:
        The need that each window's pages keep, None before the first audit.
    """
    needs: list[float | None] = []
    need: float | None = None
    for pages in found:
        if pages is not None:
            now = min(pages, wanted)
            need = now if need is None else max(now, need + (now - need) * DECAY)
        needs.append(need)
    return needs
