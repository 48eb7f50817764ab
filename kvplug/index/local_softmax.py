"""Softmax of a few queries over keys that lie in pages as ``[D, P]``, for one KV head.

Logits are on base 2: the caller scales queries by ``scale * log2(e)``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kvplug.numeric import power_of_two

LANES = 16
"""Floats in a vector register."""
TILE = 64
"""Keys whose logits are computed at a time."""
BIG = np.float32(1e30)
"""Logits beyond it, and NaN, get no mass."""


@njit(cache=True, fastmath={"contract"})
def page_logits(rows, visible, keys, places, logits):  # type: ignore[no-untyped-def]
    """``logits[r, j] = rows[r] . key j`` for every row's visible keys, and a few more.

    Args:
        rows: ``[R, D]``.
        visible: ``[R]`` keys that each row sees, ascending.
        keys: ``[pages, D, P]``.
        places: Where in ``keys`` the pages of the context lie, in order.
        logits: ``[R, at least as many as keys and a tile more]``.

    Four rows share every load of the keys and four dimensions every load of the sums; keys are
    copied into a tile of fixed width first, without which the compiler makes code that takes four
    times as long (measured at 32 tokens per page).
    """
    count, dim = rows.shape
    tile = np.empty((dim, TILE), dtype=np.float32)
    sums = np.empty((4, TILE), dtype=np.float32)
    s0, s1, s2, s3 = sums[0], sums[1], sums[2], sums[3]
    last = count - 1
    for first in range(0, visible[last], TILE):
        _fill_tile(keys, places, first, visible[last], tile)
        for r in range(0, count, 4):
            if visible[min(r + 3, last)] <= first:
                continue
            v0, v1 = rows[r], rows[min(r + 1, last)]
            v2, v3 = rows[min(r + 2, last)], rows[min(r + 3, last)]
            sums[:] = 0
            for d in range(0, dim - dim % 4, 4):
                p0, p1, p2, p3 = tile[d], tile[d + 1], tile[d + 2], tile[d + 3]
                for t in range(TILE):
                    a0, a1, a2, a3 = p0[t], p1[t], p2[t], p3[t]
                    s0[t] = s0[t] + v0[d] * a0 + v0[d + 1] * a1 + v0[d + 2] * a2 + v0[d + 3] * a3
                    s1[t] = s1[t] + v1[d] * a0 + v1[d + 1] * a1 + v1[d + 2] * a2 + v1[d + 3] * a3
                    s2[t] = s2[t] + v2[d] * a0 + v2[d + 1] * a1 + v2[d + 2] * a2 + v2[d + 3] * a3
                    s3[t] = s3[t] + v3[d] * a0 + v3[d + 1] * a1 + v3[d + 2] * a2 + v3[d + 3] * a3
            for d in range(dim - dim % 4, dim):
                for t in range(TILE):
                    s0[t] += v0[d] * tile[d, t]
                    s1[t] += v1[d] * tile[d, t]
                    s2[t] += v2[d] * tile[d, t]
                    s3[t] += v3[d] * tile[d, t]
            for i in range(min(4, count - r)):
                logits[r + i, first : first + TILE] = sums[i]


@njit(cache=True)
def _fill_tile(keys, places, first, stop, tile):  # type: ignore[no-untyped-def]
    """``tile[:, t] = key first + t`` of the context, up to key ``stop``."""
    dim, page = keys.shape[1:]
    column = 0
    while column < min(TILE, stop - first):
        source, offset = keys[places[(first + column) // page]], (first + column) % page
        width = min(page - offset, TILE - column)
        if width % LANES != 0:
            for d in range(dim):
                for t in range(width):
                    tile[d, column + t] = source[d, offset + t]
        else:
            for d in range(dim):
                for t in range(0, width, LANES):
                    here = source[d, offset + t : offset + t + LANES]
                    there = tile[d, column + t : column + t + LANES]
                    for lane in range(LANES):
                        there[lane] = here[lane]
        column += width


@njit(cache=True, fastmath={"contract"})
def exponentials(row, count, page):  # type: ignore[no-untyped-def]
    """``row[:count]`` becomes ``2 ** (row - max)``, then zeros to the end of the page.

    Returns:
        One over the sum; 0 where no logit is a number.
    """
    width = (count + LANES - 1) // LANES * LANES
    padded = row[:width]
    padded[count:] = -BIG
    for t in range(width):
        padded[t] = padded[t] if abs(padded[t]) <= BIG else -BIG
    lanes = np.full(LANES, -BIG, dtype=np.float32)
    for first in range(0, width, LANES):
        part = padded[first : first + LANES]
        for lane in range(LANES):
            lanes[lane] = max(lanes[lane], part[lane])
    top = lanes.max()
    for t in range(width):
        x = padded[t] - top
        power = power_of_two(max(x, np.float32(-126)))
        padded[t] = power if x >= np.float32(-126) else np.float32(0)
    lanes[:] = 0
    for first in range(0, width, LANES):
        part = padded[first : first + LANES]
        for lane in range(LANES):
            lanes[lane] += part[lane]
    row[count : (count + page - 1) // page * page] = 0
    total = lanes.sum()
    return np.float32(1) / total if top > -BIG else np.float32(0)
