"""Buffers that outlive a step, so that the per-step path allocates nothing of size."""

from __future__ import annotations

import math

import torch


class Workspace:
    """Named scratch tensors that only ever grow; one workspace serves every layer of a group.

    A tensor handed out is valid until the next :meth:`take` of the same name.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor of ``shape``.

        Args:
            name: What it is for; the same name gives the same memory.
            shape: Wanted shape.
            dtype: Wanted type; fixed per name.
        """
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size + size // 2, dtype=dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
