"""Contract of the budget stage: far pages per window and KV head."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from kvplug.stage import Layer, Stage

if TYPE_CHECKING:
    import torch

    from kvplug.step import Step
    from kvplug.workspace import Workspace


class Budget(Stage):
    """Turns the user's budget into a number of far pages.

    A window with at most :meth:`pages` far pages is dense in every layer. Where ``varies`` is
    false, every other window selects just that many; page-table widths and the attention op's own
    schedule are then made once per step instead of once per layer.
    """

    kind = "budget"
    audits: ClassVar[bool] = False
    """Whether it computes exact attention now and then, which reads the whole context."""
    varies: ClassVar[bool] = False
    """Whether windows, heads or layers get different numbers, by :meth:`count`."""

    def for_layer(self, layer: Layer) -> Budget:
        """What counts in the layer: itself, unless it keeps state."""
        return self

    @abstractmethod
    def pages(self, budget: int, page: int) -> int:
        """Far pages that a window selects per KV head, on average over layers at most.

        Args:
            budget: The user's ``budget``, in tokens.
            page: Tokens per page.
        """

    def most_pages(self, budget: int, page: int) -> int:
        """Far pages that a window can select in any one layer and head."""
        return self.pages(budget, page)

    def count(
        self, scores: torch.Tensor, queries: torch.Tensor, step: Step, counts: torch.Tensor,
        workspace: Workspace,
    ) -> None:  # fmt: skip
        """Says how many pages to select; called only where ``varies``.

        Args:
            scores: ``[W, Hk, N]`` float32, as the index wrote them.
            queries: ``[T, H, D]`` float32 of the step.
            step: Windows and page numbers; ``windows.num_selected`` is :meth:`pages` of the
                request's budget.
            counts: ``[W, Hk]`` int32, holds the same and is written: at least 1, at most
                :meth:`most_pages` and the window's far pages.
            workspace: Where buffers live.
        """
        raise NotImplementedError
