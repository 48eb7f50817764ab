"""Activation-bias probe of ActQKV (Xiao et al. 2025, arXiv 2502.13542).

A token counts by how far its query stands out from all queries before the window: its squared
distance from their mean in units of their variance, ``phi = (q - mu)^2 / (var + mean(var) / 100)``,
averaged over dimensions. The probe is the mean query under these weights. A decoded token is a
window of its own and its probe is its query.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.carry import NOWHERE, carried
from kvplug.compiled import compiled
from kvplug.errors import KvplugError, nearest_name
from kvplug.probe.base import Probe, Probes, queries_themselves
from kvplug.probe.distance import weighted_distance
from kvplug.probe.query_statistics import QueryStatistics

if TYPE_CHECKING:
    from kvplug.stage import Layer
    from kvplug.step import Step
    from kvplug.workspace import Workspace

SHARES = ("all", "each")
LANES = 16
"""Floats in a vector register, to estimate work."""
TINY = 1e-20
"""Variance of a dimension that never varied."""
OPERATIONS = 5
"""Vector operations per LANES numbers of a query, to estimate work."""


@dataclass(frozen=True)
class ActivationProbe(Probe):
    """The weighted mean query of each query head: ``R = G`` vectors per KV head."""

    name = "activation"
    query_at_decode = True

    warm_up: int = 1
    """Windows of a prompt before weights are used; until then the probe is the mean query."""
    sharpness: float = 1.0
    """Power that weights are raised to: 0 gives the mean query, 1 is the paper's."""
    share: str = "all"
    """Who weighs a token: ``all`` heads together, as in the paper, or ``each`` KV head."""

    def __post_init__(self) -> None:
        """Refuses what has no meaning."""
        if self.warm_up < 1:
            raise KvplugError(
                f"activation probe needs warm_up >= 1 window, for the first has nothing to stand "
                f"out from, not {self.warm_up}."
            )
        if not 0 <= self.sharpness <= 100:
            raise KvplugError(
                f"activation probe needs 0 <= sharpness <= 100, not {self.sharpness}."
            )
        if self.share not in SHARES:
            raise KvplugError(f"Unknown share {self.share!r}: {nearest_name(self.share, SHARES)}.")

    def for_layer(self, layer: Layer) -> Probe:
        """See :meth:`Probe.for_layer`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Bound(**own, statistics=layer.own(QueryStatistics))

    def build(
        self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
    ) -> Probes:
        """Only a layer's own probe knows what came before."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bound(ActivationProbe):
    """The probe of one layer."""

    statistics: QueryStatistics

    def build(
        self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
    ) -> Probes:
        """See :meth:`Probe.build`."""
        decoded = queries_themselves(queries, num_kv_heads, step)
        if decoded is not None:
            return decoded
        rows, windows, memory = step.sparse_windows, step.windows, self.statistics
        _, heads, dim = queries.shape
        group, shares = heads // num_kv_heads, 1 if self.share == "all" else num_kv_heads
        vectors = workspace.take(
            "probe.vectors", (len(rows), num_kv_heads, group, dim), torch.float32
        )
        longest = int(windows.num_tokens[rows].max(initial=1))
        weights = workspace.take("probe.weights", (len(rows), shares, longest), torch.float32)
        _weighted_means(
            queries.numel() // LANES * OPERATIONS, queries.numpy(), rows,
            windows.request, windows.token_start, windows.num_tokens, windows.context_end,
            step.block_table_host, memory.shape.window, memory.shape.page, *memory.host,
            np.float32(self.warm_up * memory.shape.window), np.float32(self.sharpness),
            weights.numpy(), vectors.view(len(rows), heads, dim).numpy(),
        )  # fmt: skip
        return Probes(vectors, torch.full((len(rows),), group, dtype=torch.int32))


@njit(cache=True)
def _normalise(weights, sharpness):  # type: ignore[no-untyped-def]
    """Sharpens biases and makes them sum to 1; NaN and infinite ones weigh nothing."""
    most = np.float32(0)
    for t in range(weights.shape[0]):
        if not np.isfinite(weights[t]):
            weights[t] = 0
        most = max(most, weights[t])
    if most == 0:  # no token stands out
        weights[:] = np.float32(1) / np.float32(weights.shape[0])
        return
    total = np.float32(0)
    for t in range(weights.shape[0]):
        share = weights[t] / most
        weights[t] = share if sharpness == 1 else share**sharpness
        total += weights[t]
    for t in range(weights.shape[0]):
        weights[t] /= total


@njit(cache=True, fastmath={"contract"})
def _add_weighted(queries, start, head, weights, out):  # type: ignore[no-untyped-def]
    """``out = sum_t weights[t] * queries[start + t, head]``."""
    out[:] = 0
    for t in range(weights.shape[0]):
        weight = weights[t]
        if weight == 0:  # a token that weighs nothing may be NaN
            continue
        for d in range(out.shape[0]):
            out[d] += weight * queries[start + t, head, d]


@compiled(fastmath={"contract"})
def _weighted_means(  # type: ignore[no-untyped-def]
    queries, rows, request, token_start, num_tokens, context_end, block_table, window, page,
    means, variances, counts, warm_up, sharpness, weights, out,
):  # fmt: skip
    """``out[w, h]`` = weighted mean of window ``rows[w]``'s queries of head ``h``."""
    _, heads, dim = queries.shape
    shares = weights.shape[1]
    group = heads // shares
    for task in prange(rows.shape[0] * shares):
        w, share = task // shares, task % shares
        row = rows[w]
        start, count, first_head = token_start[row], num_tokens[row], share * group
        if count == 1:
            out[w, first_head : first_head + group] = queries[
                start, first_head : first_head + group
            ]
            continue
        mine = weights[w, share, :count]
        mine[:] = 0
        inverse = np.empty(dim, dtype=np.float32)
        before, _, _ = carried(context_end[row] - count, context_end[row], True, window, page)
        if before != NOWHERE:
            known = block_table[request[row], before]
            floor = variances[known, first_head : first_head + group].mean() / 100 + TINY
            for head in range(first_head, first_head + group):
                if counts[known, head] < warm_up:
                    continue
                for d in range(dim):
                    inverse[d] = 1 / (variances[known, head, d] + np.float32(floor))
                for t in range(count):
                    mine[t] += weighted_distance(
                        queries[start + t, head], means[known, head], inverse
                    )
        _normalise(mine, sharpness)
        for head in range(first_head, first_head + group):
            _add_weighted(queries, start, head, mine, out[w, head])


def activation_reference(
    window: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, sharpness: float, shares: int
) -> torch.Tensor:
    """Twin of :meth:`ActivationProbe.build` in plain torch, for one window after the warm-up.

    Args:
        window: ``[c, H, D]`` queries.
        mean: ``[H, D]`` of the queries before the window.
        variance: ``[H, D]`` of the queries before the window.
        sharpness: See :class:`ActivationProbe`.
        shares: 1 where all heads weigh together, Hk where each KV head does.

    Returns:
        ``[H, D]``.
    """
    q, mean, variance = (x.double().unflatten(-2, (shares, -1)) for x in (window, mean, variance))
    floor = variance.mean((-2, -1), keepdim=True) / 100
    phi = (q - mean) ** 2 / (variance + floor)  # [c, shares, H / shares, D]
    weight = phi.mean((-2, -1)) ** sharpness
    weight = weight / weight.sum(0)
    return (weight[:, :, None, None] * q).sum(0).flatten(0, 1)
