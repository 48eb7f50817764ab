"""Page scores from estimated logits: the logarithm of a page's shares of attention, over probes.

A softmax over the far pages turns each probe's logits into shares, and shares of all probes are
summed. So a probe whose attention is spread over the context does not outvote one that looks for
one place, whatever the lengths of the two.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange

from kvplug.compiled import compiled
from kvplug.numeric import log_two, power_of_two

LEAST = np.float32(-126)
"""Binary logarithm of the least share: smaller ones are no normal floats."""
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
        logits: ``[W, Hk, R, N]`` float32, in units of ln 2.
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
            most = np.float32(-np.inf)
            for n in range(pages):
                most = mine[n] if most < mine[n] < np.float32(np.inf) else most
            total = np.float32(0)
            for n in range(pages):
                share = power_of_two(min(max(mine[n] - most, LEAST), np.float32(0)))
                is_number = mine[n] - mine[n] == 0
                total += share if is_number else np.float32(0)
            log_total = most + log_two(max(total, np.float32(1)))
            for n in range(pages):
                share = power_of_two(min(max(mine[n] - log_total, LEAST), np.float32(0)))
                is_number = mine[n] - mine[n] == 0
                shares[n] += share if is_number else np.float32(np.nan)
        for n in range(pages):
            is_number = shares[n] == shares[n]
            shares[n] = LOG_2 * log_two(shares[n]) if is_number else np.float32(np.nan)


def share_scores_reference(logits: torch.Tensor) -> torch.Tensor:
    """Twin of :func:`sum_shares` in plain torch, for one window and finite logits.

    Args:
        logits: ``[Hk, R, N]`` in units of ln 2.

    Returns:
        ``[Hk, N]`` float64; shares below ``2 ** LEAST`` count as that.
    """
    shares = (logits.double() * math.log(2)).log_softmax(-1)
    return shares.clamp_min(float(LEAST) * math.log(2)).logsumexp(1)
