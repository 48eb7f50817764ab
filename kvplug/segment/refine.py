"""Where a boundary fits best: the split of the keys around it into two communities.

Fountas et al. (2025, "Human-inspired Episodic Memory for Infinite Context LLMs", arXiv 2407.09450)
move a surprising token's boundary to where the similarity graph of the keys splits best. The graph
is ``A[i, j] = k_i . k_j``, summed over heads, so the weight within a run of tokens is the squared
length of the sum of its keys: prefix sums make each candidate O(1) in the number of tokens.
"""

from __future__ import annotations

import torch
from numba import njit

METRICS = ("none", "modularity", "conductance")
"""A metric's number is its place here."""
MODULARITY, CONDUCTANCE = 1, 2


@njit(cache=True)
def modularity(within, degree, total):  # type: ignore[no-untyped-def]
    """Modularity of a split in two; the larger, the better.

    ``Q = (2m - 2 A_LR - (k_L^2 + k_R^2) / 2m) / 4m``, which equals the sum over both communities
    of ``(A_ij - k_i k_j / 2m) / 4m``.

    Args:
        within: ``A_LL``, the weight within the left community, every pair counted twice.
        degree: ``k_L = A_LL + A_LR``, the degrees of the left community.
        total: ``2m``, the weight of everything.
    """
    between, other = degree - within, total - degree
    return (total - 2 * between - (degree * degree + other * other) / total) / (2 * total)


@njit(cache=True)
def conductance(within, degree, total):  # type: ignore[no-untyped-def]
    """Conductance of a split in two; the smaller, the better.

    The weight between the communities over that within the lighter of community and rest, the
    least of both communities. As in the authors' code, a community weighs what is within it.

    Args:
        within: ``A_LL``.
        degree: ``k_L``.
        total: ``2m``.
    """
    between = degree - within
    right = total - degree - between
    best = float("inf")
    for weight in (within, right):
        lighter = min(weight, total - weight)
        if lighter > 0:
            best = min(best, between / lighter)
    return best


@njit(cache=True, fastmath={"reassoc", "contract"})  # sums in vector lanes; NaN stays NaN
def best_split(sums, begin, end, first, last, metric):  # type: ignore[no-untyped-def]
    """The best place to split the tokens ``begin .. end`` in two.

    Args:
        sums: ``[n + 1, E]`` float64: ``sums[t]`` is the sum of the first t tokens' keys, heads
            one behind the other.
        begin: First token.
        end: Behind the last.
        first: First candidate: the first token of the right community, above ``begin``.
        last: Last candidate, which stands unless another is better; of equals the last wins.
        metric: ``MODULARITY`` or ``CONDUCTANCE``.
    """
    size = sums.shape[1]
    total = 0.0
    for e in range(size):
        whole = sums[end, e] - sums[begin, e]
        total += whole * whole
    if not total > 0:  # nothing there, or NaN
        return last
    best, best_value = last, -float("inf")
    for t in range(last, first - 1, -1):
        within, degree = 0.0, 0.0
        for e in range(size):
            left = sums[t, e] - sums[begin, e]
            within += left * left
            degree += left * (sums[end, e] - sums[begin, e])
        if metric == MODULARITY:
            value = modularity(within, degree, total)
        else:
            value = -conductance(within, degree, total)
        if value > best_value:
            best, best_value = t, value
    return best


def best_split_reference(
    keys: torch.Tensor, begin: int, end: int, first: int, last: int, metric: str
) -> int:
    """Twin of :func:`best_split` by the definitions, O(w^3).

    Args:
        keys: ``[n, Hk, D]``.
        begin: First token of the split run.
        end: Behind its last.
        first: First candidate.
        last: Last candidate.
        metric: Name of the metric.
    """
    window = keys[begin:end].double()
    graph = torch.einsum("ihd,jhd->ij", window, window)
    degrees, total = graph.sum(1), graph.sum()
    values = []
    for t in range(last, first - 1, -1):
        sides = [torch.zeros(end - begin, dtype=torch.bool) for _ in range(2)]
        sides[0][: t - begin] = True
        sides[1][t - begin :] = True
        if metric == "modularity":
            expected = torch.outer(degrees, degrees) / total
            parts = [(graph - expected)[side][:, side].sum() for side in sides]
            values.append(float(sum(parts) / (2 * total)))
        else:
            cut = graph[sides[0]][:, sides[1]].sum()
            inside = [graph[side][:, side].sum() for side in sides]
            weights = [min(x, total - x) for x in inside]
            values.append(-min(float(cut / w) if w > 0 else torch.inf for w in weights))
    return last - max(range(len(values)), key=lambda i: values[i])
