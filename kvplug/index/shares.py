"""Page scores from estimated logits: the logarithm of a page's shares of attention, over probes.

A softmax over the far pages turns each probe's logits into shares, and shares of all probes are
summed. So a probe whose attention is spread over the context does not outvote one that looks for
one place, whatever the lengths of the two.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.numeric import bits_float, log_two, power_of_two
from kvplug.select.bisection import ZERO, order_of

LEAST = np.float32(-126)
"""Binary logarithm of the least share: smaller ones are no normal floats."""
LEAST_SHARE = np.float32(2.0**-126)
LOG2_E = np.float32(1 / np.log(2))
LOG_2 = np.float32(np.log(2))
OPERATIONS = 12
"""Vector operations of a share and its logarithm, to estimate work."""


@compiled()
def sum_shares(  # type: ignore[no-untyped-def]
    logits, counts, rows, far_begin, far_end, scores
):
    """``scores[w, h, n] = log of the sum over r of 2^logits[r, n] / sum over pages of the same``.

    A page whose logit is no number has no share in others' sums, and no number for a score.

    Args:
        logits: ``[W, Hk, R, N]`` float32, in units of ln 2; overwritten.
        counts: ``[W]`` int32 probes of each window.
        rows: ``[W]`` numbers of the sparse windows.
        far_begin: ``[S]`` of the step's windows.
        far_end: ``[S]``.
        scores: ``[W, Hk, N]`` float32, written.
    """
    num_windows, num_kv_heads = scores.shape[:2]
    for task in prange(num_windows * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        pages = far_end[rows[w]] - far_begin[rows[w]]
        shares = scores[w, head, :pages]
        shares[:] = 0
        for r in range(counts[w]):
            mine = logits[w, head, r, :pages]
            _to_powers(mine, _largest(mine))
            _add_shares(mine, np.float32(1) / max(_sum(mine), np.float32(1)), shares)
        _to_logs(shares)


# One loop a function: so the compiler runs each on vectors (together 7 times as fast).


@njit(cache=True)
def _largest(row):  # type: ignore[no-untyped-def]
    """The largest number of a row, NaN without one; compared as integers that order alike."""
    best = np.uint32(0)
    for n in range(row.shape[0]):
        best = max(best, order_of(row[n]))
    return bits_float(np.uint32(best ^ ZERO) if best >= ZERO else np.uint32(~best))


@njit(cache=True)
def _to_powers(row, most):  # type: ignore[no-untyped-def]
    """``2 ** (row - most)`` in place of a row, at least ``2 ** LEAST``; NaN of no number."""
    for n in range(row.shape[0]):
        x = row[n] - most
        power = power_of_two(min(max(x, LEAST), np.float32(0)))
        row[n] = power if x - x == 0 else np.float32(np.nan)


@njit(cache=True, fastmath={"reassoc", "nsz"})
def _sum(row):  # type: ignore[no-untyped-def]
    """The sum of what is no NaN."""
    total = np.float32(0)
    for n in range(row.shape[0]):
        total += row[n] if row[n] == row[n] else np.float32(0)
    return total


@njit(cache=True)
def _add_shares(row, factor, shares):  # type: ignore[no-untyped-def]
    """``shares += factor * row``, each at least ``2 ** LEAST``."""
    for n in range(row.shape[0]):
        share = row[n] * factor
        # Comparisons with NaN are false, so it stays.
        shares[n] += LEAST_SHARE if share < LEAST_SHARE else share


@njit(cache=True, error_model="numpy")
def _to_logs(row):  # type: ignore[no-untyped-def]
    """The natural logarithm in place of a row; NaN stays."""
    for n in range(row.shape[0]):
        found = LOG_2 * log_two(row[n])
        row[n] = found if row[n] == row[n] else np.float32(np.nan)


def share_scores_reference(logits: torch.Tensor) -> torch.Tensor:
    """Twin of :func:`sum_shares` in plain torch, for one window and finite logits.

    Args:
        logits: ``[Hk, R, N]`` in units of ln 2.

    Returns:
        ``[Hk, N]`` float64; shares below ``2 ** LEAST`` count as that.
    """
    shares = (logits.double() * math.log(2)).log_softmax(-1)
    return shares.clamp_min(float(LEAST) * math.log(2)).logsumexp(1)
