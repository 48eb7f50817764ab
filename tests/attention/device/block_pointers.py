"""Block pointers for kernels of others in Triton's interpreter, which dropped them in 3.9."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple


class BlockPointer(NamedTuple):
    """As Triton 3.8 documents ``tl.make_block_ptr``."""

    language: ModuleType
    base: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offsets: tuple[Any, ...]
    block_shape: tuple[int, ...]

    def places(self, boundary_check: tuple[int, ...]) -> tuple[Any, Any]:
        """Pointers of the block's elements, and a mask of those within checked bounds, or None."""
        tl, pointers, mask = self.language, self.base, None
        for axis, size in enumerate(self.block_shape):
            along = tl.arange(0, size).to(tl.int64) + self.offsets[axis]
            for other in range(len(self.block_shape)):
                along = along if other == axis else tl.expand_dims(along, other)
            pointers = pointers + along * self.strides[axis]
            if axis in boundary_check:
                within = (along >= 0) & (along < self.shape[axis])
                mask = within if mask is None else mask & within
        return pointers, mask


class Language:
    """``triton.language`` with block pointers.

    Args:
        language: Triton's own module.
    """

    def __init__(self, language: ModuleType) -> None:
        self._language = language

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language, name)

    def make_block_ptr(
        self, base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any
    ) -> BlockPointer:
        """The order of axes in memory is a hint."""
        sizes = tuple(getattr(size, "value", size) for size in block_shape)
        return BlockPointer(self._language, base, shape, strides, offsets, sizes)

    def advance(self, pointer: BlockPointer, steps: tuple[Any, ...]) -> BlockPointer:
        moved = tuple(a + b for a, b in zip(pointer.offsets, steps, strict=True))
        return pointer._replace(offsets=moved)

    def load(self, pointer: Any, boundary_check: tuple[int, ...] = (), **options: Any) -> Any:
        if not isinstance(pointer, BlockPointer):
            return self._language.load(pointer, **options)
        pointers, mask = pointer.places(boundary_check)
        padding = None if mask is None else 0.0
        return self._language.load(pointers, mask=mask, other=padding, **options)

    def store(
        self, pointer: Any, value: Any, boundary_check: tuple[int, ...] = (), **options: Any
    ) -> None:
        if isinstance(pointer, BlockPointer):
            pointer, options["mask"] = pointer.places(boundary_check)
        self._language.store(pointer, value, **options)
