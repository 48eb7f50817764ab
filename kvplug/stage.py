"""What a stage is, and what it may know of the layer it serves.

A recipe names one stage per step of the pipeline. Stages are frozen dataclasses whose fields are
the user's options; ``for_layer`` turns one into what works on one layer, with state where it needs
any. State that several stages read is a :class:`Memory`, of which a layer has one per class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from kvplug.errors import KvplugError
from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.page_reader import PageReader
    from kvplug.rotary import FixedPositions
    from kvplug.step import Sealing, Step


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
    local: int
    """Tokens before a window's first query, itself included, that are always attended."""
    scale: float
    """Of the layer's logits, ``1 / sqrt(D)`` in most models."""
    softcap: float
    """Cap of the layer's logits, 0 for none."""
    dense_below: int
    """Windows whose context ends at or before this token attend to everything."""


class Passage:
    """What passes through one layer in one step; valid until the layer's step ends.

    Args:
        queries: ``[T, H, D]`` after the rotary embedding, any float dtype.
        keys: ``[T, Hk, D]`` as they went into the cache, any float dtype.
        step: ``step.stream`` has every window, dense ones included, in order.
        workspace: Where buffers live.
        fixed: Where queries and keys are moved to before anyone sees them; None leaves them.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        step: Step,
        workspace: Workspace,
        fixed: FixedPositions | None = None,
    ) -> None:
        """Holds its arguments."""
        self.step, self.workspace = step, workspace
        self._queries, self._keys, self._fixed = queries, keys, fixed

    @cached_property
    def queries(self) -> torch.Tensor:
        """``[T, H, D]`` float32, converted when they are first asked for."""
        if self._fixed is None:
            return as_float(self._queries, self.workspace, "queries")
        queries = self.workspace.take("queries", tuple(self._queries.shape), torch.float32)
        return self._fixed.move_queries(queries.copy_(self._queries), self.step.positions)

    def query_memory(self) -> tuple[np.ndarray, int]:
        """Queries where they lie, for those who read them once and convert nothing.

        Returns:
            Flat memory, of float32 or of bfloat16 bits as uint16, and how far apart tokens are in
            it: number ``d`` of head ``h`` of token ``t`` is at ``t * apart + h * D + d``.
        """
        queries = self._queries
        lies_flat = queries.stride()[1:] == (queries.shape[2], 1)
        if self._fixed is not None or queries.dtype != torch.bfloat16 or not lies_flat:
            return self.queries.view(-1).numpy(), self.queries.stride(0)
        apart = queries.stride(0)
        length = (len(queries) - 1) * apart + queries[0].numel()
        return queries.as_strided((length,), (1,)).view(torch.uint16).numpy(), apart

    @cached_property
    def keys(self) -> torch.Tensor:
        """``[T, Hk, D]`` float32, likewise."""
        if self._fixed is None:
            return as_float(self._keys, self.workspace, "keys")
        keys = self.workspace.take("keys", tuple(self._keys.shape), torch.float32)
        return self._fixed.move_keys(keys.copy_(self._keys), self.step.positions)

    def queries_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, H, D]`` float32 queries of some tokens, without converting all of them."""
        queries = self.cached_queries_at(tokens)
        if self._fixed is None:
            return queries
        return self._fixed.move_queries(queries, self.step.positions[tokens])

    def cached_queries_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same, never moved: they go with :attr:`Layer.cached_reader`."""
        return self._queries[tokens].float()

    def keys_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[n, Hk, D]`` float32 keys of some tokens."""
        keys = self._keys[tokens].float()
        if self._fixed is None:
            return keys
        return self._fixed.move_keys(keys, self.step.positions[tokens])


def as_float(vectors: torch.Tensor, workspace: Workspace, name: str) -> torch.Tensor:
    """``vectors`` as contiguous float32, in the workspace unless they are that already."""
    if vectors.dtype == torch.float32 and vectors.is_contiguous():
        return vectors
    return workspace.take(name, tuple(vectors.shape), torch.float32).copy_(vectors)


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

    def forget(self, slots: torch.Tensor) -> None:
        """Slots have new keys: forgets what was learnt of the old. The default does nothing.

        Args:
            slots: ``[T]`` int64, ``page * P + offset``; negative ones are padding and skipped.
        """

    def watch(self, passage: Passage) -> None:
        """Learns from one step, after its keys were written and before anything is scored.

        Called in every step, dense ones included. What it stores for a window may depend on
        nothing behind that window, for a chunk may hold later ones (design rule 4).
        """

    def begin(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Learns from the first tokens of contexts before their pages are sealed or scored.

        What it stores belongs to the context's first page. The default does nothing.

        Args:
            sealed: ``sealed.begun`` are the contexts, at least one. Their first ``local`` tokens
                are in the cache; of those behind, some may not be.
            step: The step that retrieves from them.
            workspace: Where buffers live.
        """

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Summarises pages, whose keys are in the cache. The default does nothing.

        Called before windows that may retrieve them are scored, after every memory has watched the
        step. A page is sealed by the first window that retrieves and has it in its far range,
        whatever the chunks and the batch are.

        Args:
            sealed: The pages, at least one.
            step: The step that seals them.
            workspace: Where buffers live.
        """

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, physical page first."""
        return ()

    def nbytes(self) -> float:
        """Bytes that it takes when every page of the cache is in use."""
        return sum(tensor.nbytes for tensor in self.state)


class Scratch(Memory):
    """Buffers that the stages of all layers share (:meth:`Layer.shared`); it remembers nothing."""

    def __init__(self, layer: Layer) -> None:
        """Starts empty."""
        super().__init__(layer)
        self.workspace = Workspace()


M = TypeVar("M", bound=Memory)


class Layer:
    """One layer, as its stages see it while they are bound to it.

    Args:
        shape: Geometry.
        common: Memories that all layers of the model share, by class.
        reader: Reads keys back from the cache; None where its packing is not known.
        fixed: Where stages see queries and keys; None for where they are.
    """

    def __init__(
        self,
        shape: LayerShape,
        common: dict[type, Memory],
        reader: PageReader | None,
        fixed: FixedPositions | None = None,
    ) -> None:
        """Starts without memories."""
        self.shape = shape
        self.memories: dict[type, Memory] = {}
        self._common = common
        self._reader, self._fixed = reader, fixed

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
        """Reads keys back from the cache, ``[n, D, P]``, as stages see them.

        Raises:
            KvplugError: It cannot be read.
        """
        reader = self.cached_reader
        return (
            reader if self._fixed is None else self._fixed.reader(reader, self.shape.num_kv_heads)
        )

    @property
    def cached_reader(self) -> PageReader:
        """Reads keys where they stand in their contexts; for neighbours that need distances.

        Raises:
            KvplugError: It cannot be read.
        """
        if self._reader is None:
            raise KvplugError(
                "This recipe reads keys back from the KV cache, and kvplug cannot tell how this "
                "CPU's kernel packs them: choose another --kv-cache-dtype, or policy streaming."
            )
        return self._reader

    @property
    def row_reader(self) -> PageReader:
        """Reads keys back from the cache as rows, ``[n, P, D]``.

        Raises:
            KvplugError: It cannot be read.
        """
        return self.reader.transposed()


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
    Pages are then shared only by requests whose texts agree that much further."""

    @abstractmethod
    def for_layer(self, layer: Layer) -> Any:
        """What does the work in one layer: itself, where it needs no state."""
