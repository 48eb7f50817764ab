"""Operations that numba lacks: compiler intrinsics, and bfloat16 as its bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

C1, C2, C3, C4, C5, C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))
"""Taylor coefficients of ``2 ** x``."""
L1, L3, L5, L7, L9 = (np.float32(2 / math.log(2) / k) for k in (1, 3, 5, 7, 9))
"""Coefficients of ``log2((1 + s) / (1 - s))``."""
ROUNDER = np.float32(1.5 * 2**23)
"""Added to a small float32, it leaves the nearest whole number in the low bits."""


@intrinsic
def popcount(typing_context: Any, word: Any) -> Any:
    """Number of set bits of a ``uint64``, as an ``int64``."""
    if word != types.uint64:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def float_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a ``float32``, as a ``uint32``."""
    if value != types.float32:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def bits_float(typing_context: Any, bits: Any) -> Any:
    """The ``float32`` that a ``uint32`` spells."""
    if bits != types.uint32:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@njit(cache=True, inline="always")
def to_bfloat16(value):  # type: ignore[no-untyped-def]
    """The bits of the ``bfloat16`` nearest to a ``float32``, ties to even; any NaN gives one."""
    if value != value:
        return np.uint16(0x7FC0)
    bits = float_bits(value)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(cache=True, inline="always")
def from_bfloat16(bits):  # type: ignore[no-untyped-def]
    """The ``float32`` value of ``bfloat16`` bits."""
    return bits_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@intrinsic
def number(typing_context: Any, value: Any) -> Any:
    """A ``float32`` as it is, or the value of ``bfloat16`` bits: for functions that take either."""
    if value == types.float32:
        return types.float32(types.float32), lambda context, builder, signature, args: args[0]
    if value != types.uint16:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(args[0], context.get_value_type(types.uint32))
        bits = builder.shl(wide, context.get_constant(types.uint32, 16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.uint16), generate


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def dot_bfloat16(vector, bits):  # type: ignore[no-untyped-def]
    """``vector . bits`` for ``[D]`` float32 and ``[D]`` bfloat16 bits, as a float32.

    The compiler may choose the order of the sum, and chooses one per number of dimensions: a loop
    over vector registers, 8 times as fast at D = 128 as sums kept in an array of lanes (8 ns).
    """
    total = np.float32(0)
    for d in range(vector.shape[0]):
        total += vector[d] * from_bfloat16(bits[d])
    return total


@njit(cache=True, inline="always")
def power_of_two(x):  # type: ignore[no-untyped-def]
    """``2 ** x`` for float32 ``x`` from -126 to 0, within 3 units in the last place.

    Unlike the library's, the compiler can run it on a vector of floats.
    """
    rounded = x + ROUNDER
    f = x - (rounded - ROUNDER)
    fraction = np.float32(1) + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    whole = np.uint32(np.uint32(float_bits(rounded) << np.uint32(23)) + np.uint32(127 << 23))
    return fraction * bits_float(whole)


@njit(cache=True, inline="always")
def log_two(x):  # type: ignore[no-untyped-def]
    """The binary logarithm of a normal positive float32, within 3 units in the last place of 1.

    By the series of atanh, like :func:`power_of_two` for a vector of floats at a time, in functions
    that are compiled with ``error_model="numpy"``: it divides.
    """
    # The mantissa between 1 / sqrt(2) and sqrt(2), and what it is to be multiplied by.
    shifted = np.uint32(float_bits(x) - np.uint32(0x3F3504F3))
    whole = np.int32(shifted) >> np.int32(23)
    mantissa = bits_float(np.uint32((shifted & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)))
    s = (mantissa - np.float32(1)) / (mantissa + np.float32(1))
    z = s * s
    return np.float32(whole) + s * (L1 + z * (L3 + z * (L5 + z * (L7 + z * L9))))
