"""Moves rotated queries and keys to other positions, by the model's own rotary table.

A rotary embedding (Su et al. 2021, RoFormer, arXiv 2104.09864) multiplies each pair of dimensions
by ``m (cos, -sin; sin, cos)`` of an angle that grows with the position. Such factors are inverted
and composed within their pair, so what stands rotated in a cache can be moved: divided by its
position's factor and multiplied by another's. Factors are read from the table that the model
rotates by, so that scaled frequencies, a magnitude ``m`` (YaRN's) and the table's own rounding
need no second derivation; divided by the table's own factor, even a rounded one leaves no trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.numeric import bits_float

if TYPE_CHECKING:
    from kvplug.page_reader import PageReader
    from kvplug.windows import Ints


LANES = 16
"""Floats in a vector register, to estimate work."""
ROWS = 32
"""Vectors that one task moves."""


class Turn(NamedTuple):
    """Factors from one position to another, for ``R / 2`` pairs of dimensions."""

    cos: torch.Tensor
    """``[..., R / 2]`` float, the factors' real parts."""
    sin: torch.Tensor
    """``[..., R / 2]``, their imaginary parts."""


class Rotary:
    """A rotary table, and which dimensions make a pair.

    Args:
        table: ``[positions, R]`` cosines, then sines, of ``R / 2`` pairs; any float type. Not
            copied.
        is_neox: Whether dimension ``i`` is paired with ``i + R / 2``; if not, ``2i`` with
            ``2i + 1``. Dimensions from R on are not rotated.
    """

    def __init__(self, table: torch.Tensor, is_neox: bool) -> None:
        """Holds its arguments."""
        self.table, self.is_neox = table, is_neox
        self.width = table.shape[1]
        """R."""
        half = self.width // 2
        self._first = slice(0, half) if is_neox else slice(0, self.width, 2)
        self._second = slice(half, self.width) if is_neox else slice(1, self.width, 2)
        # Compiled code knows no 16-bit floats but these.
        table = table if table.dtype == torch.bfloat16 else table.float()
        self._shift = 16 if table.dtype == torch.bfloat16 else 0
        self._bits = table.view(torch.uint16 if self._shift else torch.uint32).numpy()

    def factors(
        self, positions: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[..., R / 2]`` cosines and sines of positions ``[...]`` int64.

        Behind the table's end, where the unwritten tokens of a last page stand, they are its last.
        """
        found = self.table[positions.clamp(max=len(self.table) - 1)].to(dtype)
        cos, sin = found.chunk(2, dim=-1)
        return cos, sin

    def turn(
        self, start: torch.Tensor, target: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> Turn:
        """What moves vectors from one position to another.

        Args:
            start: ``[...]`` int64, where they stand.
            target: ``[...]`` or ``[]`` int64, where they shall.
            dtype: Of the factors.
        """
        cos, sin = self.factors(start, dtype)
        new_cos, new_sin = self.factors(target, dtype)
        size = cos * cos + sin * sin
        return Turn((new_cos * cos + new_sin * sin) / size, (new_sin * cos - new_cos * sin) / size)

    def apply(self, vectors: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Moves vectors in place.

        Args:
            vectors: ``[..., D]`` of the factors' type; any strides.
            turn: Factors that broadcast with ``[..., R / 2]``.

        Returns:
            ``vectors``.
        """
        first, second = vectors[..., self._first], vectors[..., self._second]
        moved = first * turn.cos - second * turn.sin
        second.mul_(turn.cos).addcmul_(first, turn.sin)
        first.copy_(moved)
        return vectors

    def move(self, vectors: torch.Tensor, positions: torch.Tensor, target: int) -> torch.Tensor:
        """Moves vectors to one position, in place: :meth:`apply` of :meth:`turn`, compiled.

        Args:
            vectors: ``[n, heads, D]`` float32, contiguous.
            positions: ``[n]`` int64, where they stand.
            target: Where they shall.

        Returns:
            ``vectors``.
        """
        cos, sin = self.factors(torch.tensor(target))
        _move(
            vectors.numel() // LANES, vectors.numpy(), positions.numpy(), self._bits, self._shift,
            cos.numpy(), sin.numpy(), self.is_neox,
        )  # fmt: skip
        return vectors


@compiled(fastmath={"contract"})
def _move(  # type: ignore[no-untyped-def]
    vectors, positions, table, shift, new_cos, new_sin, is_neox
):
    """See :meth:`Rotary.move`; ``table`` has float32 bits, but for the lowest ``shift``."""
    count, heads, _ = vectors.shape
    half = new_cos.shape[0]
    for task in prange((count + ROWS - 1) // ROWS):
        turn_cos, turn_sin = np.empty(half, np.float32), np.empty(half, np.float32)
        for n in range(task * ROWS, min(count, (task + 1) * ROWS)):
            factors = table[min(positions[n], table.shape[0] - 1)]
            for i in range(half):
                cos = bits_float(np.uint32(np.uint32(factors[i]) << np.uint32(shift)))
                sin = bits_float(np.uint32(np.uint32(factors[half + i]) << np.uint32(shift)))
                size = np.float32(1) / (cos * cos + sin * sin)
                turn_cos[i] = (new_cos[i] * cos + new_sin[i] * sin) * size
                turn_sin[i] = (new_sin[i] * cos - new_cos[i] * sin) * size
            for head in range(heads):
                vector = vectors[n, head]
                if is_neox:
                    for i in range(half):
                        first, second = vector[i], vector[half + i]
                        vector[i] = first * turn_cos[i] - second * turn_sin[i]
                        vector[half + i] = second * turn_cos[i] + first * turn_sin[i]
                else:
                    for i in range(half):
                        first, second = vector[2 * i], vector[2 * i + 1]
                        vector[2 * i] = first * turn_cos[i] - second * turn_sin[i]
                        vector[2 * i + 1] = second * turn_cos[i] + first * turn_sin[i]


class PageNumbers:
    """Where in its context every physical page stands.

    A page that several requests share is the same page of each, for they share all that is before
    it too.

    Args:
        num_pages: Physical pages of the cache.
        page: Tokens per page, P.
    """

    def __init__(self, num_pages: int, page: int) -> None:
        """Starts with zeros."""
        self.page = page
        self._numbers = torch.zeros(num_pages, dtype=torch.int64)

    def note(self, block_table: Ints, seq_lens: Ints) -> None:
        """Notes the pages of a step's contexts.

        Args:
            block_table: ``[B, max_pages]`` int32 physical pages.
            seq_lens: ``[B]`` tokens of each context.
        """
        _note(block_table, seq_lens, self.page, self._numbers.numpy())

    def positions(self, pages: torch.Tensor) -> torch.Tensor:
        """``[..., P]`` int64 positions of the tokens of physical pages ``[...]`` int64."""
        return self._numbers[pages, None] * self.page + torch.arange(self.page)


@njit(cache=True)
def _note(block_table, seq_lens, page, numbers):  # type: ignore[no-untyped-def]
    """Numbers every page of each context."""
    for row in range(seq_lens.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            numbers[block_table[row, n]] = n


class FixedPositions(NamedTuple):
    """Where a layer's queries and keys stand that are not near each other: at ``distance`` and 0.

    InfLLM (Xiao et al. 2024, arXiv 2402.04617) scores and attends far keys so.
    """

    rotary: Rotary
    """Of the layer."""
    numbers: PageNumbers
    """Of the engine's pages."""
    distance: int
    """Tokens between a query and every key that is as far from it or further."""

    def move_queries(self, queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Moves ``[n, heads, D]`` float32 queries from ``[n]`` to ``distance``, in place."""
        return self.rotary.move(queries, positions, self.distance)

    def move_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Moves ``[n, heads, D]`` float32 keys from ``[n]`` to 0, in place."""
        return self.rotary.move(keys, positions, 0)

    def reader(self, reader: PageReader, num_kv_heads: int) -> PageReader:
        """Reads what ``reader`` reads of the cache, moved to 0."""

        def move(rows: torch.Tensor, keys: torch.Tensor) -> None:
            at = self.numbers.positions(rows // num_kv_heads)
            if keys.is_contiguous():
                self.rotary.move(keys.flatten(0, 1)[:, None], at.flatten(), 0)
            else:
                self.rotary.apply(keys, self.rotary.turn(at, torch.tensor(0)))

        return reader.with_change(move)
