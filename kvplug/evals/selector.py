"""How good a selection is, without asking anyone: against exact attention over the same cache.

Per layer and KV head, for the query that the next token depends on: how much of exact attention
falls on the attended pages, how many of the best far pages were found, and how far the output is
from that of exact attention. All three work on any model.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvplug.errors import KvplugError
from kvplug.exact_mass import Mass, Pages
from kvplug.observe.mass_meter import MassMeter

if TYPE_CHECKING:
    from kvplug.page_reader import PageReader
    from kvplug.page_table import PageTable


class Choice(NamedTuple):
    """One KV head's selection, means over its query heads."""

    captured: float
    """Share of exact attention on the attended pages."""
    best: float
    """The most that as many far pages could have captured."""
    found: float
    """Share of those best far pages that were attended; 1 where none is asked for."""
    error: float
    """Distance of the output from exact attention's, over the latter's length."""


class SelectorMeter(MassMeter):
    """A layer's ``observer``.

    Args:
        reader: Reads the layer's keys.
        values: Reads its values.
        scale: Of its logits.
        softcap: Cap of its logits, 0 for none.
        since: Windows whose context ends before this token are not measured.
    """

    def __init__(
        self, reader: PageReader, values: PageReader, scale: float, softcap: float, since: int
    ) -> None:
        """Starts without measurements."""
        super().__init__(reader, scale, softcap, since)
        self.values = values
        self.choices: dict[int, list[Choice]] = {}
        """KV head -> one entry per window."""

    @classmethod
    def of(cls, impl: Any, since: int) -> SelectorMeter:
        """A meter of one attention layer.

        Raises:
            KvplugError: Its cache cannot be read, or keys are attended elsewhere than they stand.
        """
        if impl.fixed is not None:
            raise KvplugError("Selections are measured where positions are 'orig'.")
        reader = impl.attend.reader(impl.cache)
        values = impl.attend.value_reader(impl.cache)
        if reader is None or values is None:
            raise KvplugError("Selections are measured from a KV cache that kvplug can read.")
        return cls(reader, values, impl.scale, impl.logits_soft_cap, since)

    def head(self, queries: torch.Tensor, table: PageTable, s: int, head: int) -> Mass:
        """See :meth:`MassMeter.head`."""
        pages = Pages.of(table, s, head)
        logits = self.logits(queries, pages.rows, pages.context).double()  # [N, G, P]
        shares = logits.logsumexp(2).T.softmax(1).mean(0)
        best = shares[pages.far].topk(pages.chosen)
        outside = float(shares[~pages.far].sum())
        hits = pages.attended[pages.far][best.indices]
        choice = Choice(
            float(shares[pages.attended].sum()),
            float(best.values.sum()) + outside,
            float(hits.double().mean()) if pages.chosen else 1.0,
            self._error(logits, pages),
        )
        self.choices.setdefault(head, []).append(choice)
        return Mass(choice.captured, choice.best)

    def _error(self, logits: torch.Tensor, pages: Pages) -> float:
        """Relative distance of attention to the attended pages from attention to all."""
        values = self.values.read(pages.rows, self._workspace).double()  # [N, P, D]
        # What a page's unwritten end held before may be no number, and counts 0 times.
        values.flatten(0, 1)[pages.context :] = 0
        outputs = []
        for seen in (torch.ones_like(pages.attended), pages.attended):
            hidden = logits.masked_fill(~seen[:, None, None], -torch.inf)
            weights = hidden.transpose(0, 1).flatten(1).softmax(1)  # [G, N * P]
            outputs.append(weights @ values.flatten(0, 1))
        exact, selected = outputs
        distance = (selected - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)
        return float(distance.mean())

    def means(self) -> list[Choice]:
        """The mean over windows, for each KV head."""
        return [
            Choice(*(statistics.fmean(column) for column in zip(*choices, strict=True)))
            for _, choices in sorted(self.choices.items())
        ]
