"""Probe by last and most activated tokens of a window.

A window's last tokens are what decoding continues from; its most activated tokens, those whose
queries stand out from the window, carry what it asks for. Activation is ActQKV's activation bias
(Xiao et al. 2025, arXiv 2502.13542): the squared deviation of a query from the mean, in units of
the variance, summed over dimensions. Here mean and variance are those of the window itself, so a
probe depends on its window alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.probe.base import Probe, Probes, queries_themselves
from kvplug.probe.distance import weighted_distance

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace


@dataclass(frozen=True)
class LastAndActivatedProbe(Probe):
    """``R = G * (last + active)`` vectors per KV head: every query head of the chosen tokens."""

    name = "last_activated"
    query_at_decode = True

    last: int = 4
    """Tokens taken from the window's end."""
    active: int = 4
    """Tokens taken from the rest of the window, most activated first, chosen per KV head."""

    def __post_init__(self) -> None:
        """Refuses counts that leave no probe."""
        if self.last < 1 or self.active < 0:
            raise KvplugError(
                f"probe options need last >= 1 and active >= 0, not {self.last}, {self.active}."
            )

    def build(
        self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
    ) -> Probes:
        """See :meth:`Probe.build`."""
        decoded = queries_themselves(queries, num_kv_heads, step)
        if decoded is not None:
            return decoded
        rows = step.sparse_windows
        _, heads, dim = queries.shape
        group = heads // num_kv_heads
        tokens = np.minimum(step.windows.num_tokens[rows], self.last + self.active)
        most = int(tokens.max(initial=1))
        vectors = workspace.take(
            "probe.vectors", (len(rows), num_kv_heads, most * group, dim), torch.float32
        )
        _last_and_activated(
            queries.numel(), queries.numpy(),
            step.windows.token_start, step.windows.num_tokens, rows, tokens,
            self.last, num_kv_heads, vectors.numpy(),
        )  # fmt: skip
        return Probes(vectors, torch.from_numpy(tokens * np.int32(group)))


@compiled()
def _last_and_activated(  # type: ignore[no-untyped-def]
    queries, token_start, num_tokens, rows, num_probed, last, num_kv_heads, out
):
    """Copies the queries of the chosen tokens of window ``rows[w]`` into ``out[w]``."""
    group = queries.shape[1] // num_kv_heads
    for task in prange(rows.shape[0] * num_kv_heads):
        w, kv_head = task // num_kv_heads, task % num_kv_heads
        start, count, wanted = token_start[rows[w]], num_tokens[rows[w]], num_probed[w]
        first_head = kv_head * group
        target = out[w, kv_head]
        if wanted == count:
            for i in range(count):
                target[i * group : (i + 1) * group] = queries[
                    start + i, first_head : first_head + group
                ]
            continue
        bias = _activation_bias(queries, start, count, first_head, group)
        for i in range(last):
            token = start + count - last + i
            target[i * group : (i + 1) * group] = queries[token, first_head : first_head + group]
        bias = bias[: count - last]
        for i in range(last, wanted):
            best = np.argmax(bias)
            bias[best] = -1.0
            target[i * group : (i + 1) * group] = queries[
                start + best, first_head : first_head + group
            ]


@njit(cache=True, inline="never")
def _activation_bias(queries, start, count, first_head, group):  # type: ignore[no-untyped-def]
    """``[count]`` activation bias of each token, summed over a KV head's query heads."""
    dim = queries.shape[2]
    bias = np.zeros(count, dtype=np.float32)
    mean = np.empty(dim, dtype=np.float32)
    weight = np.empty(dim, dtype=np.float32)
    for head in range(first_head, first_head + group):
        mean[:] = 0
        weight[:] = 0
        for token in range(start, start + count):
            for d in range(dim):
                mean[d] += queries[token, head, d]
        mean /= np.float32(count)
        for token in range(start, start + count):
            for d in range(dim):
                delta = queries[token, head, d] - mean[d]
                weight[d] += delta * delta
        floor = np.float32(weight.mean() * 0.01) + np.float32(1e-30)
        for d in range(dim):
            weight[d] = np.float32(count) / (weight[d] + floor)
        for token in range(count):
            bias[token] += weighted_distance(queries[start + token, head], mean, weight)
    return bias


def last_and_activated_reference(
    queries: torch.Tensor, num_kv_heads: int, step: Step, last: int, active: int
) -> list[torch.Tensor]:
    """Twin of :meth:`LastAndActivatedProbe.build` in plain torch.

    Returns:
        One ``[Hk, R_w, D]`` per sparse window.
    """
    dim = queries.shape[2]
    windows, built = step.windows, []
    for w in step.sparse_windows:
        start, count = int(windows.token_start[w]), int(windows.num_tokens[w])
        window = queries[start : start + count].float().view(count, num_kv_heads, -1, dim)
        per_head = []
        for kv_head in range(num_kv_heads):
            mine = window[:, kv_head]  # [count, G, D]
            tokens = list(range(count))
            if count > last + active:
                spread = (mine - mine.mean(0)) ** 2
                variance = spread.mean(0)
                weighted = spread / (variance + variance.mean(-1, keepdim=True) / 100)
                bias = weighted.sum((1, 2))[: count - last]
                tokens = tokens[-last:] + bias.topk(active).indices.tolist()
            per_head.append(mine[tokens].reshape(-1, dim))
        built.append(torch.stack(per_head))
    return built
