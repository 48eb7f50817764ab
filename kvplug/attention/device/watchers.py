"""What learns from every step of a layer on a GPU, and what a layer's stages may own.

The twin on CPU of a watcher is :class:`kvplug.stage.Memory` with ``watch``, of
:class:`BoundLayer` :class:`kvplug.stage.Layer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from kvplug.attention.device.plan import DevicePlan
    from kvplug.kernels.far_pages import FarPages
    from kvplug.kernels.paged_attention import PagedCache
    from kvplug.stage import LayerShape


class DeviceState:
    """Tensors by physical page and slot (design rule 1), allocated when it is made.

    Args:
        layer: Whose; of what all layers share, the first that asked.
    """

    def __init__(self, layer: BoundLayer) -> None:
        """Holds the layer's geometry; subclasses allocate."""
        self.shape = layer.shape

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, physical page first."""
        return ()

    def nbytes(self) -> int:
        """Bytes that it takes, whether pages are in use or not."""
        return sum(tensor.nbytes for tensor in self.state)


class DeviceWatcher(DeviceState, ABC):
    """Learns from the queries and keys of every step of one layer, dense steps included."""

    @abstractmethod
    def watch(
        self, queries: torch.Tensor, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan
    ) -> None:
        """Learns from one step, whose keys are in the cache, before anything is scored.

        Nothing may wait for the device. What it stores for a window may depend on nothing behind
        that window (design rule 4). Slots that the step writes may have held other content, of
        which nothing may be left: there is no other notice of it.

        Args:
            queries: ``[T, H, D]`` after the rotary embedding.
            keys: ``[T, Hk, D]``.
            cache: The layer's.
            plan: The step; ``plan.stream`` is there.
        """


class DeviceSealer(DeviceState, ABC):
    """Summarises pages of one layer when a window may first retrieve them."""

    @abstractmethod
    def seal(self, cache: PagedCache, far: FarPages, most_far: int) -> None:
        """Summarises those far pages of a step's sparse windows that it has not summarised.

        After everything has watched the step, before its windows are scored. The host does not know
        which pages those are; a page may be in the far ranges of several windows.

        Args:
            cache: The layer's, with the keys of all far pages.
            far: Of all the windows.
            most_far: Far pages of the window that has most of them.
        """


S = TypeVar("S", bound=DeviceState)


class BoundLayer:
    """One layer, as its stages see it while they are made.

    Args:
        shape: Geometry.
        device: Where.
        common: What all layers share, by class.
    """

    def __init__(
        self, shape: LayerShape, device: torch.device, common: dict[type, DeviceState]
    ) -> None:
        """Starts without state."""
        self.shape, self.device = shape, device
        self.states: dict[type, DeviceState] = {}
        self._common = common

    def own(self, kind: type[S]) -> S:
        """The layer's state of this class, made on first use; a watcher is then told of steps."""
        return _of(self, self.states, kind)

    def shared(self, kind: type[S]) -> S:
        """All layers' state of this class, made on first use; nothing is told to it."""
        return _of(self, self._common, kind)

    @property
    def watchers(self) -> list[DeviceWatcher]:
        """Those of its own that learn from steps, in the order in which they were made."""
        return [state for state in self.states.values() if isinstance(state, DeviceWatcher)]

    @property
    def sealers(self) -> list[DeviceSealer]:
        """Those of its own that summarise pages, likewise."""
        return [state for state in self.states.values() if isinstance(state, DeviceSealer)]


def _of(layer: BoundLayer, states: dict[type, DeviceState], kind: type[S]) -> S:
    """The one of a class."""
    if kind not in states:
        states[kind] = kind(layer)
    state = states[kind]
    assert isinstance(state, kind)
    return state
