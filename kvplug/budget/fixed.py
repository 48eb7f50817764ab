"""Fixed budgets: the user's number of tokens, or none at all."""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.budget.base import Budget


@dataclass(frozen=True)
class FixedBudget(Budget):
    """As many whole pages as fit the user's budget."""

    name = "fixed"

    def pages(self, budget: int, page: int) -> int:
        """See :meth:`Budget.pages`."""
        return budget // page


@dataclass(frozen=True)
class NoBudget(Budget):
    """No far pages: sinks and the local region only, whatever the user's budget."""

    name = "none"

    def pages(self, budget: int, page: int) -> int:
        """See :meth:`Budget.pages`."""
        return 0
