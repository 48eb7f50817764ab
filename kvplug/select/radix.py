"""The best of a row of scores by radix selection: three counting passes, no sort.

NaN and infinities are worse than any number, and of equal scores the last one in the row, the
newest page, wins.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kvplug.numeric import float_bits

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Bit position and width of the three digits of a 32-bit key, most significant first."""
PASSES = len(DIGITS) + 1
"""Times that a score is looked at."""
BINS = 2048
"""Of the histogram that callers lend."""


@njit(cache=True, inline="always")
def order_of(score):  # type: ignore[no-untyped-def]
    """An unsigned integer that orders as ``score`` does; NaN and infinities come first."""
    bits = float_bits(score)
    if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):
        return np.uint32(0)
    if bits == np.uint32(0x80000000):  # -0.0, which equals 0.0
        return bits
    if bits >> np.uint32(31) == 1:
        return ~bits
    return bits | np.uint32(0x80000000)


@njit(cache=True)
def threshold_of(scores, wanted, histogram):  # type: ignore[no-untyped-def]
    """The ``wanted``-th largest key, how many keys equal it, and how many of these are wanted."""
    prefix, known, digit = np.uint32(0), np.uint32(0), 0
    for shift, width in DIGITS:
        size = 1 << width
        histogram[:size] = 0
        for n in range(scores.shape[0]):
            key = order_of(scores[n])
            if key & known == prefix:
                histogram[(key >> np.uint32(shift)) & np.uint32(size - 1)] += 1
        digit = size - 1
        while histogram[digit] < wanted:
            wanted -= histogram[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= np.uint32(size - 1) << np.uint32(shift)
    return prefix, histogram[digit], wanted


@njit(cache=True)
def take_best(scores, wanted, first, histogram, out):  # type: ignore[no-untyped-def]
    """``out[:wanted] = first + the positions of the best scores``, ascending."""
    threshold, equal, wanted_equal = threshold_of(scores, wanted, histogram)
    skip = equal - wanted_equal
    filled = 0
    for n in range(scores.shape[0]):
        key = order_of(scores[n])
        if key < threshold:
            continue
        if key == threshold and skip > 0:
            skip -= 1
            continue
        out[filled] = first + n
        filled += 1
