"""Reads keys and values back from the cache, whose pages are packed for a kernel and are not rows.

Which packing that is depends on the instruction set (vLLM's ``vec`` kernels keep a page of keys
transposed, its AMX kernels in interleaved pairs) and is nobody's promise, so it is not written
down anywhere: it is found by writing known numbers (:mod:`kvplug.attention.attend.packing`).

``P`` is the number of tokens per page, ``Hk`` the number of KV heads, ``D`` the head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from kvplug.compiled import compiled
from kvplug.numeric import from_bfloat16
from kvplug.windows import Ints
from kvplug.workspace import Workspace

BITS = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
    torch.float32: torch.uint32,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
"""Types that can be read, and the integers that hold their bits."""
LANES = 16
"""Numbers widened at a time, to estimate work."""


class Packing(NamedTuple):
    """Where the numbers of one page of one KV head lie among its ``2 * P * D``."""

    keys: Ints
    """``[D * P]`` int32 places of a page's keys, dimension by dimension."""
    values: Ints
    """``[P * D]`` int32 places of its values, token by token."""


Change = Callable[[torch.Tensor, torch.Tensor], None]
"""Told the rows ``[n]`` that were read, changes what was read of them, ``[n, P, D]``, in place."""


class PageReader:
    """Copies pages out of a cache as float32.

    Args:
        pages: ``[pages * Hk, N]`` contiguous: all numbers of every page, of a type in BITS.
            Those of 8 bits are quantised.
        places: ``[A * B]`` int32: which of them are read.
        shape: ``(A, B)``.
        name: Of the buffer; two readers of different names can be read from at a time.
        scale: What quantised numbers are multiplied by.
    """

    def __init__(
        self,
        pages: torch.Tensor,
        places: Ints,
        shape: tuple[int, int],
        name: str,
        scale: float = 1.0,
    ) -> None:
        """Views the pages as bits."""
        self._pages, self._dtype, self._shape, self._scale = pages, pages.dtype, shape, scale
        if pages.dtype.itemsize == 1:
            codes = torch.arange(256, dtype=torch.uint8).view(pages.dtype)
            self._numbers = (codes.float() * scale).numpy()
        self._bits = pages.view(BITS[pages.dtype]).numpy()
        self._places, self._name = places, f"reader.{name}"
        self._in_order = bool((np.diff(places) == 1).all())
        self._change: Change | None = None
        self._is_transposed = False

    def transposed(self) -> PageReader:
        """Reads the same numbers as ``[n, B, A]``."""
        first, second = self._shape
        places = np.ascontiguousarray(self._places.reshape(first, second).T).ravel()
        name = f"{self._name.removeprefix('reader.')}.transposed"
        other = PageReader(self._pages, places, (second, first), name, self._scale)
        other._change, other._is_transposed = self._change, not self._is_transposed
        return other

    def with_change(self, change: Change) -> PageReader:
        """Reads keys, ``[n, D, P]`` unless transposed, and changes them."""
        other = copy(self)
        other._change = change
        return other

    def read(self, rows: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """Copies pages of single heads.

        Args:
            rows: ``[n]`` int64, ``page * Hk + head``.
            workspace: Owns the result, until the next call.

        Returns:
            ``[n, A, B]`` float32.
        """
        count, width = len(rows), len(self._places)
        found = workspace.take(self._name, (count, *self._shape), torch.float32)
        work = count * width
        if self._dtype == torch.bfloat16:
            out = found.view(count, width).numpy()
            if self._in_order:
                _widen(work // LANES, self._bits, rows.numpy(), self._places[0], out)
            else:
                _read_bfloat16(work, self._bits, rows.numpy(), self._places, out)
        elif self._dtype == torch.float32:
            out = found.view(count, width).view(torch.uint32).numpy()
            _read(work, self._bits, rows.numpy(), self._places, out)
        elif self._dtype.itemsize == 1:
            out = found.view(count, width).numpy()
            _look_up(work, self._bits, rows.numpy(), self._places, self._numbers, out)
        else:
            half = workspace.take(f"{self._name}.half", (count, width), self._dtype)
            _read(work, self._bits, rows.numpy(), self._places, half.view(torch.uint16).numpy())
            found.view(count, width).copy_(half)
        if self._change is not None:
            self._change(rows, found if self._is_transposed else found.mT)
        return found


@compiled()
def _read(pages, rows, places, out):  # type: ignore[no-untyped-def]
    """``out[n, i] = pages[rows[n], places[i]]``."""
    for n in prange(rows.shape[0]):
        page, target = pages[rows[n]], out[n]
        for i in range(places.shape[0]):
            target[i] = page[places[i]]


@compiled()
def _read_bfloat16(pages, rows, places, out):  # type: ignore[no-untyped-def]
    """The same, of bfloat16 bits as float32."""
    for n in prange(rows.shape[0]):
        page, target = pages[rows[n]], out[n]
        for i in range(places.shape[0]):
            target[i] = from_bfloat16(page[places[i]])


@compiled()
def _widen(pages, rows, first, out):  # type: ignore[no-untyped-def]
    """The same, of bits that lie in the order that is asked for: 6 times as fast."""
    width = out.shape[1]
    for n in prange(rows.shape[0]):
        page, target = pages[rows[n]][first : first + width], out[n]
        for i in range(width):
            target[i] = from_bfloat16(page[i])


@compiled()
def _look_up(pages, rows, places, numbers, out):  # type: ignore[no-untyped-def]
    """The same, of codes that each stand for one of 256 numbers."""
    for n in prange(rows.shape[0]):
        page, target = pages[rows[n]], out[n]
        for i in range(places.shape[0]):
            target[i] = numbers[page[places[i]]]
