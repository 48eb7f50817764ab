"""What a CUDA graph does, without a GPU: the kernels of a step again, and none of its Python.

Captured are interpreted Triton kernels and torch's operators, each with the tensors and numbers
that it was called with. A replay calls them again on the same memory. What a capture on a GPU fails
at fails here too: asking for a number that is on the device, or bringing one from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "repeat_interleave")
"""Operators that a capture on a GPU does not survive."""
OWN = ("unified_attention_with_output", "unified_kv_cache_update")
"""Operators of vLLM's that are Python: what they call is noted, not they."""
ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class PretendedGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    replays = 0
    """Of all graphs of this process."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self.names: list[str] = []
        """Of kernels and operators, in order."""

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Everything that is called while it lasts."""
        executor: Any = import_module("triton.runtime.interpreter").GridExecutor
        run = executor.__call__

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            def call() -> None:
                with torch._C._DisableTorchDispatch():
                    run(kernel, *args, **kwargs)

            call()
            self.note(kernel.fn.__name__, call)

        executor.__call__ = launch
        try:
            with _Operators(self):
                yield
        finally:
            executor.__call__ = run

    def note(self, name: str, call: Callable[[], None]) -> None:
        """Keeps something that is called again."""
        self.names.append(name)
        self._calls.append(call)

    def replay(self) -> None:
        """All of it again, in order."""
        PretendedGraph.replays += 1
        for call in self._calls:
            call()


class _Operators(TorchDispatchMode):
    """Notes torch's operators.

    Args:
        graph: That takes them.
    """

    def __init__(self, graph: PretendedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} in a CUDA graph"
        if name in OWN:
            layers = import_module("vllm.model_executor.layers.attention.attention")
            with self:
                return getattr(layers, name)(*args, **kwargs)
        found = func(*args, **kwargs)
        outputs = _tensors(found)
        memory = {_memory(each) for each in _tensors((args, kwargs))}
        is_view = bool(outputs) and all(_memory(each) in memory for each in outputs)
        if name in ALLOCATING or (is_view and not func._schema.is_mutable):
            return found

        def call() -> None:
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if new is not old:
                    old.copy_(new)

        self._graph.note(name, call)
        return found


def _tensors(found: Any) -> list[torch.Tensor]:
    """Those that an operator gave, or was given."""
    return [each for each in tree_flatten(found)[0] if isinstance(each, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    """Where it lies, or what it is a view of."""
    return tensor.untyped_storage().data_ptr()
