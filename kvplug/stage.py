"""What a stage is, and what it may know of the layer it serves.

A recipe names one stage per step of the pipeline. Stages are frozen dataclasses whose fields are
the user's options; ``for_layer`` turns one into what works on one layer, with state where it needs
any. State that several stages read is a :class:`Memory`, of which a layer has one per class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    import torch

    from kvplug.page_reader import PageReader
    from kvplug.step import Step
    from kvplug.workspace import Workspace


class LayerShape(NamedTuple):
    """Geometry of one layer's cache on one worker. Lengths are in tokens."""

    num_pages: int
    """Physical pages of the cache."""
    num_kv_heads: int
    """KV heads on this worker, Hk."""
    page: int
    """Tokens per page, P."""
    head_dim: int
    """D."""
    layer: int
    """Number of the layer in the model; hash planes differ by layer."""
    first_kv_head: int
    """Model-wide number of this worker's first KV head; hash planes differ by head."""
    seed: int
    """The user's seed."""
    num_heads: int
    """Query heads on this worker, H."""
    num_layers: int
    """Layers of the model that retrieve."""
    rank: int
    """Place of the layer among those that retrieve, from 0."""
    window: int
    """Query tokens per window."""
    scale: float
    """Of the layer's logits, ``1 / sqrt(D)`` in most models."""


class Passage(NamedTuple):
    """What passes through one layer in one step; valid until the layer's step ends."""

    queries: torch.Tensor
    """``[T, H, D]`` float32, after the rotary embedding."""
    keys: torch.Tensor
    """``[T, Hk, D]`` float32, as they went into the cache."""
    step: Step
    """``step.stream`` has every window, dense ones included, in order."""
    workspace: Workspace
    """Where buffers live."""


class Memory:
    """What a layer (or all of them together) remembers, by physical page and slot.

    Design rule 1: nothing is kept by request or batch row. A page is handed to new content by
    writing its slots again, first slot first; what was remembered of it must end there.

    Args:
        layer: The layer; for a memory that all layers share, the first that asked.
    """

    def __init__(self, layer: Layer) -> None:
        """Holds the shape; subclasses allocate."""
        self.shape = layer.shape

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """New keys are in the cache: forgets what their slots held before. The default ignores it.

        Args:
            keys: ``[T, Hk, D]`` float32, as they go into the cache.
            slots: ``[T]`` int64, ``page * P + offset``; negative ones are padding and skipped.
        """

    def watch(self, passage: Passage) -> None:
        """Learns from one step, after its keys were written and before anything is scored.

        Called in every step, dense ones included. What it stores for a window may depend on
        nothing behind that window, for a chunk may hold later ones (design rule 4).
        """

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, physical page first."""
        return ()

    def nbytes(self) -> float:
        """Bytes that it takes when every page of the cache is in use."""
        return sum(tensor.nbytes for tensor in self.state)


M = TypeVar("M", bound=Memory)


class Layer:
    """One layer, as its stages see it while they are bound to it.

    Args:
        shape: Geometry.
        common: Memories that all layers of the model share, by class.
        reader: Reads keys back from the cache; None where its packing is not known.
    """

    def __init__(
        self, shape: LayerShape, common: dict[type, Memory], reader: PageReader | None
    ) -> None:
        """Starts without memories."""
        self.shape = shape
        self.memories: dict[type, Memory] = {}
        self._common = common
        self._reader = reader

    def own(self, kind: type[M]) -> M:
        """The layer's memory of this class, made on first use."""
        if kind not in self.memories:
            self.memories[kind] = kind(self)
        memory = self.memories[kind]
        assert isinstance(memory, kind)
        return memory

    def shared(self, kind: type[M]) -> M:
        """The model's memory of this class, made on first use; the pipeline never feeds it."""
        if kind not in self._common:
            self._common[kind] = kind(self)
        memory = self._common[kind]
        assert isinstance(memory, kind)
        return memory

    @property
    def reader(self) -> PageReader:
        """Reads keys back from the cache.

        Raises:
            KvplugError: It cannot be read.
        """
        if self._reader is None:
            raise KvplugError(
                "This recipe reads keys back from the KV cache, and kvplug cannot read this type "
                "of cache (fp8): choose another policy, such as simhash, or another "
                "--kv-cache-dtype."
            )
        return self._reader


class Stage(ABC):
    """One step of the pipeline. Subclasses are frozen dataclasses; fields are their options.

    Raises (from ``__post_init__`` of subclasses):
        KvplugError: An option is out of range.
    """

    kind: ClassVar[str]
    """Which step: ``index``, ``probe``, ``budget``, ``select`` or ``segment``."""
    name: ClassVar[str]
    """What users call it."""
    needs: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Feature -> what it is for. Another stage of the recipe must give it."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Features that other stages may need."""
    lookahead: ClassVar[bool] = False
    """Whether what it stores for a page depends on later queries, up to the local region's size.
    A prefix hit then ends that much earlier, so that only finished pages are shared."""

    @abstractmethod
    def for_layer(self, layer: Layer) -> Any:
        """What does the work in one layer: itself, where it needs no state."""
