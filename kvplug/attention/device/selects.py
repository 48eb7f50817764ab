"""What chooses far pages on a GPU where it is not the best by score alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.attention.device.local_mass import DeviceLocalMass
from kvplug.kernels.union_ranks import union_ranks
from kvplug.select.union import Union

if TYPE_CHECKING:
    import torch

    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.kernels.far_pages import FarPages
    from kvplug.select.base import Select


class DeviceUnion:
    """The index's best pages and those of largest mass; the twin is :mod:`kvplug.select.union`.

    Args:
        split: Share of a row's pages that goes to the index's best.
        layer: Whose.
    """

    def __init__(self, split: float, layer: BoundLayer) -> None:
        """Asks the layer's local mass for that of pages."""
        self.split = split
        self.mass = layer.own(DeviceLocalMass).keep_largest()

    def rank(self, scores: torch.Tensor, wanted: torch.Tensor | int, far: FarPages) -> torch.Tensor:
        """``[S, Hk, N]`` float32: the best by rank are the pages to take.

        Args:
            scores: ``[S, Hk, N]`` float32 of the index.
            wanted: Pages of a row, or ``[S, Hk]`` int32.
            far: The far pages.
        """
        ranks = scores.new_empty(scores.shape)
        # Rounded halves up, in float64 as on CPU.
        if isinstance(wanted, int):
            share: torch.Tensor | int = int(self.split * wanted + 0.5)
        else:
            share = (wanted.double() * self.split + 0.5).int()
        union_ranks(scores, share, self.mass, far, ranks)
        return ranks


def make_select(select: Select, layer: BoundLayer) -> DeviceUnion | None:
    """What ranks a layer's pages; None where their scores do."""
    return DeviceUnion(select.split, layer) if isinstance(select, Union) else None
