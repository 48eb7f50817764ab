"""Accumulated attention mass of whole pages: that of the token which got most of it.

HAX's key selection (arXiv 2507.00449) ranks keys, whoever asks, by the attention that they get
from the queries after them, which it predicts with a trained network. Here that attention is
measured (:mod:`.local_mass`) and a page counts as its best key. It is written down once, when the
page leaves the local region and no query adds to it any more, so that selecting reads one number
a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from numba import njit

from kvplug.index.local_mass import LocalMass
from kvplug.stage import Layer, Memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace


class PageMass(Memory):
    """``[pages, Hk]`` largest mass of a page's tokens. Stages that use it set ``lookahead``."""

    def __init__(self, layer: Layer) -> None:
        """Allocates (untouched pages cost no memory).

        Raises:
            KvplugError: Keys cannot be read back from this cache.
        """
        super().__init__(layer)
        self._local_host = layer.own(LocalMass).mass.numpy()
        self.mass = torch.zeros((self.shape.num_pages, self.shape.num_kv_heads))
        """``[pages, Hk]`` float32; says nothing of a page that is not sealed."""
        self.mass_host = self.mass.numpy()

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.mass,)

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Takes the mass of pages; the local mass has seen the whole step before.

        Windows of the step behind the one that seals a page have it outside their local regions,
        so they have added nothing to it.
        """
        _take_largest(self._local_host, sealed.pages, self.mass_host)


@njit(cache=True)
def _take_largest(mass, pages, largest):  # type: ignore[no-untyped-def]
    """``largest[page, head] = max over tokens of mass[page, head]``."""
    for page in pages:
        for head in range(mass.shape[1]):
            best = mass[page, head, 0]
            for t in range(1, mass.shape[2]):
                best = max(best, mass[page, head, t])
            largest[page, head] = best


def page_mass_reference(mass: torch.Tensor, pages: Iterable[int]) -> dict[int, torch.Tensor]:
    """Twin of :meth:`PageMass.seal` in plain torch.

    Args:
        mass: ``[pages, Hk, P]``.
        pages: Those that a step seals.

    Returns:
        ``[Hk]`` of each.
    """
    return {page: mass[page].amax(-1) for page in pages}
