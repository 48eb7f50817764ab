"""How far a query stands out: its distance from a mean in units of the variance."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def weighted_distance(query, mean, weight):  # type: ignore[no-untyped-def]
    """``sum_d (query_d - mean_d)^2 * weight_d``, in the one order that the compiler chooses."""
    total = np.float32(0)
    for d in range(query.shape[0]):
        delta = query[d] - mean[d]
        total += delta * delta * weight[d]
    return total
