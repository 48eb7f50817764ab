"""Rounding of float32 to bfloat16 by its bits, alike on every GPU and in Triton's interpreter.

The interpreter cuts off where hardware rounds to nearest, and bounds must be rounded outwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest_bits(value):  # type: ignore[no-untyped-def]
    """Bits of the bfloat16 nearest to a float32 block, ties to even, as uint16; one NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value != value, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def outward_bits(value, UPWARDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of a float32 block as bfloat16, rounded up or down, as uint16."""
    bits = value.to(tl.uint32, bitcast=True)
    if UPWARDS:
        grows = bits >> 31 == 0
    else:
        grows = bits >> 31 == 1
    is_cut = (bits & 0xFFFF) != 0
    return ((bits >> 16) + (is_cut & grows).to(tl.uint32)).to(tl.uint16)
