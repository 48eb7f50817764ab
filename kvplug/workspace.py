"""Buffers that outlive a step, so that the per-step path allocates nothing of size."""

from __future__ import annotations

import math

import torch

SPARE_BYTES = 2**20
"""What a buffer that grows is made larger than asked, at most; small ones by half."""


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
            self._buffers.pop(name, None)  # its memory is free before the larger one's is taken
            del buffer
            spare = min(size // 2, SPARE_BYTES // dtype.itemsize)
            buffer = self._buffers[name] = torch.empty(size + spare, dtype=dtype)
        return buffer[:size].view(shape)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
