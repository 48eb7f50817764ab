"""Mean probe: one vector per query head, the mean of the window's queries.

At decode a window is one token and the probe is the query itself, as Quest uses it (Tang et al.
2024, arXiv 2406.10774). InfLLM (Xiao et al. 2024, arXiv 2402.04617) averages prefill windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from numba import prange

from kvplug.compiled import compiled
from kvplug.probe.base import Probe, Probes, queries_themselves

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace


@dataclass(frozen=True)
class MeanProbe(Probe):
    """The mean query of each query head: ``R = G`` vectors per KV head."""

    name = "mean"
    query_at_decode = True

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
        vectors = workspace.take(
            "probe.vectors", (len(rows), num_kv_heads, group, dim), torch.float32
        )
        _mean_queries(
            queries.numel(), queries.numpy(),
            step.windows.token_start, step.windows.num_tokens, rows,
            vectors.view(len(rows), heads, dim).numpy(),
        )  # fmt: skip
        return Probes(vectors, torch.full((len(rows),), group, dtype=torch.int32))


@compiled()
def _mean_queries(queries, token_start, num_tokens, rows, out):  # type: ignore[no-untyped-def]
    """``out[w, h] = mean of queries[tokens of window rows[w], h]``."""
    _, heads, dim = queries.shape
    for task in prange(rows.shape[0] * heads):
        w, head = task // heads, task % heads
        start, count = token_start[rows[w]], num_tokens[rows[w]]
        total = out[w, head]
        total[:] = queries[start, head]
        for token in range(start + 1, start + count):
            for d in range(dim):
                total[d] += queries[token, head, d]
        if count > 1:
            for d in range(dim):
                total[d] /= count


def mean_queries_reference(queries: torch.Tensor, num_kv_heads: int, step: Step) -> torch.Tensor:
    """Twin of :meth:`MeanProbe.build` in plain torch: ``[W, Hk, G, D]``."""
    heads, dim = queries.shape[1:]
    means = []
    for w in step.sparse_windows:
        start, count = int(step.windows.token_start[w]), int(step.windows.num_tokens[w])
        means.append(queries[start : start + count].float().mean(0))
    return torch.stack(means).view(-1, num_kv_heads, heads // num_kv_heads, dim)
