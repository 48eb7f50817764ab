"""Captured attention mass: how much of exact attention falls on the keys that a layer attends to.

Attention over everything is computed from the cache in float32, beside what the layer does, and
each key's weight is filed under its page. The sum over the pages in the layer's row of the page
table is what the layer captured; the largest sum that as many far pages could have captured is
what the best choice would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.exact_mass import ExactAttention, Mass, Pages

if TYPE_CHECKING:
    import torch

    from kvplug.page_reader import PageReader
    from kvplug.page_table import PageTable
    from kvplug.pipeline import Plan


class MassMeter(ExactAttention):
    """Measures one layer's windows; a layer's ``observer``.

    Args:
        reader: Reads the layer's keys.
        scale: Of the layer's logits.
        softcap: Cap of the layer's logits, 0 for none.
        since: Windows whose context ends before this token are not measured.
    """

    def __init__(self, reader: PageReader, scale: float, softcap: float, since: int) -> None:
        """Starts without measurements."""
        super().__init__(reader, scale, softcap)
        self.since = since
        self.measured: list[Mass] = []
        """One entry per window, of its last query."""

    def __call__(self, queries: torch.Tensor, plan: Plan) -> None:
        """Measures the windows of one step.

        Args:
            queries: ``[T, H, D]`` of the step.
            plan: The step's, with the layer's pages selected.
        """
        assert plan.table is not None
        windows = plan.step.windows
        for s in range(len(windows)):
            if windows.context_end[s] >= self.since:
                self.measured.append(self.window(queries, plan.table, s))

    def window(self, queries: torch.Tensor, table: PageTable, s: int) -> Mass:
        """Measures window ``s`` of a step with ``[T, H, D]`` queries, by its last one."""
        groups = table.step.last_queries(queries, s, table.num_kv_heads)
        shares = [self.head(group, table, s, head) for head, group in enumerate(groups)]
        return Mass.mean(shares)

    def head(self, queries: torch.Tensor, table: PageTable, s: int, head: int) -> Mass:
        """Captured and best share of one KV head, means over its ``[G, D]`` queries."""
        pages = Pages.of(table, s, head)
        shares = self.shares(queries, pages.rows, pages.context).mean(0)
        best = shares[pages.far].topk(pages.chosen).values.sum() + shares[~pages.far].sum()
        return Mass(float(shares[pages.attended].sum()), float(best))
