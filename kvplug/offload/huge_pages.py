"""Memory in the system's large pages."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch

HUGE_PAGE = 2**21
"""Bytes that the system maps at once where it can."""


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the system's large pages, if it has them: slots are used in no order."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + nbytes].view(dtype).view(shape)
