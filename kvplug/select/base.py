"""Contract of the select stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kvplug.step import Step


class Select(ABC):
    """Chooses far pages by score."""

    @abstractmethod
    def select(self, scores: torch.Tensor, step: Step, selected: torch.Tensor) -> None:
        """Chooses the pages of every sparse window, in one call.

        Args:
            scores: ``[W, Hk, N]`` float32 of the step's ``W`` sparse windows. NaN is worse than
                any number; of equal scores the newest page wins. So where scores say nothing,
                the newest pages are chosen.
            step: Windows, with ``num_selected`` pages to choose in each.
            selected: ``[W, Hk, K]`` int32, written: distinct logical page numbers of the request,
                ascending, all in ``[far_begin, far_end)``; entries from ``num_selected`` on are
                left alone.
        """
