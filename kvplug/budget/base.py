"""Contract of the budget stage: far pages per window and KV head."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Budget(ABC):
    """Turns the user's budget into a number of far pages.

    The number is the same for every layer and known before any score is: page-table widths and
    the attention op's own schedule are then made once per step instead of once per layer.
    """

    @abstractmethod
    def pages(self, budget: int, page: int) -> int:
        """Far pages that a window selects per KV head, where it has more than that.

        Args:
            budget: The user's ``budget``, in tokens.
            page: Tokens per page.
        """
