"""Contract of the select stage."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from kvplug.stage import Layer, Stage

if TYPE_CHECKING:
    import torch

    from kvplug.step import Step


class Select(Stage):
    """Chooses far pages by score."""

    kind = "select"

    def for_layer(self, layer: Layer) -> Select:
        """What selects in the layer: itself, unless it keeps state."""
        return self

    @abstractmethod
    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """Chooses the pages of every sparse window, in one call.

        Args:
            scores: ``[W, Hk, N]`` float32 of the step's ``W`` sparse windows; it may overwrite
                them. NaN and infinities are worse than any number; of equal scores the newest page
                wins. So where scores say nothing, the newest pages are chosen.
            step: Windows and page numbers.
            counts: ``[W, Hk]`` int32, pages to choose: at least 1, at most the window's far pages.
            selected: ``[W, Hk, K]`` int32, written: exactly that many distinct logical page
                numbers of the request, ascending, all in ``[far_begin, far_end)``; entries behind
                them are left alone.
        """
