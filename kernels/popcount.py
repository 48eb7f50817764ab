"""Number of set bits, in arithmetic that every GPU has.

Compilers know the pattern: for NVIDIA and AMD GPUs it becomes one instruction per 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _popcount32(word):  # type: ignore[no-untyped-def]
    """Set bits of a ``uint32`` block: sums of 2, 4 and 8 bits side by side, then of the bytes."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def popcount64(low, high):  # type: ignore[no-untyped-def]
    """Set bits of 64-bit words given as two ``uint32`` blocks, as int32."""
    return (_popcount32(low) + _popcount32(high)).to(tl.int32)
