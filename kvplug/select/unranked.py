"""Counts rows whose scores do not rank their pages: the trace that NaN keys or queries leave."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def count_unranked(scores, rows, far_begin, far_end):  # type: ignore[no-untyped-def]
    """Rows (window, KV head) whose far pages have a NaN or plus infinity for a score, or no number.

    Minus infinity is a legal score, of a page that an index has ruled out; not of all of them.

    Args:
        scores: ``[W, Hk, N]`` float32.
        rows: ``[W]`` numbers of the sparse windows.
        far_begin: ``[S]`` of the step's windows.
        far_end: ``[S]``.
    """
    total = 0
    for w in range(rows.shape[0]):
        pages = far_end[rows[w]] - far_begin[rows[w]]
        for head in range(scores.shape[1]):
            mine = scores[w, head, :pages]
            bad, numbers = 0, 0
            for n in range(pages):
                # Comparisons with NaN are false; sums, so that the loop runs in vectors.
                bad += not (mine[n] < np.float32(np.inf))
                numbers += mine[n] > np.float32(-np.inf)
            total += bad > 0 or numbers == 0
    return total
