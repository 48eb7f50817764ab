"""The coarse merge of HCAM (Lampinen et al. 2021, arXiv 2105.14039), in plain torch.

Attention inside each selected page by itself, and outputs weighted by the softmax of the pages'
summaries: with ``l_b = scale * q . mean_b + log |b|`` and ``o_b = softmax(q . K_b) V_b``,
``o = sum_b softmax(l)_b o_b``. Sinks and local pages together are one more member, with their
exact log-sum-exp for ``l``. A page whose keys differ weighs less than in attention (Jensen), so
this is not attention to the selected pages, whose weights would be their own log-sum-exps.

A mode for research, and slow: a loop over windows and heads in Python, keys and values unpacked as
float32. A window that is dense because its budget covers everything attends as ever.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kvplug.page_reader import PageReader

if TYPE_CHECKING:
    from kvplug.pipeline import Plan
    from kvplug.workspace import Workspace

ROWS = 256
"""Queries of one KV head that are attended at a time: what bounds the memory."""


class CoarseMerge:
    """Attends a layer's sparse windows by the coarse merge.

    Args:
        keys: Reads the layer's keys.
        values: Reads the layer's values.
        means: ``[pages, Hk, D]`` mean keys, as the layer's index keeps them.
        scale: Of the dot products.
        softcap: Cap of the logits, 0 for none.
    """

    def __init__(
        self,
        keys: PageReader,
        values: PageReader,
        means: torch.Tensor,
        scale: float,
        softcap: float,
    ) -> None:
        """Holds its arguments."""
        self._keys, self._values = keys, values
        self._means, self._num_kv_heads = means.flatten(0, 1), means.shape[1]
        self._scale, self._softcap = scale, softcap

    def __call__(
        self, query: torch.Tensor, output: torch.Tensor, plan: Plan, workspace: Workspace
    ) -> None:
        """Writes the output of every sparse window; leaves the others' alone.

        Args:
            query: ``[T, H, D]``.
            output: ``[T, H, D]``, written.
            plan: The step's plan, with the layer's pages selected.
            workspace: Where keys and values are unpacked.
        """
        windows = plan.step.windows
        for s in plan.step.sparse_windows:
            start, count = int(windows.token_start[s]), int(windows.num_tokens[s])
            tokens = slice(start, start + count)
            mine = query[tokens].float().unflatten(1, (self._num_kv_heads, -1))
            out = output[tokens].unflatten(1, (self._num_kv_heads, -1))
            for head in range(self._num_kv_heads):
                out[:, head] = self._attend(mine[:, head], plan, int(s), head, workspace)

    def _attend(
        self, query: torch.Tensor, plan: Plan, s: int, head: int, workspace: Workspace
    ) -> torch.Tensor:
        """``[n, G, D]`` float32: one window's queries ``[n, G, D]`` of one KV head."""
        assert plan.table is not None
        windows, page = plan.step.windows, plan.table.page
        end, far_begin, far_end = (
            int(column[s]) for column in (windows.context_end, windows.far_begin, windows.far_end)
        )
        row = s * self._num_kv_heads + head
        filled = -(-int(plan.table.seq_lens[row]) // page)
        selected = filled - far_begin - (-(-end // page) - far_end)
        rows = plan.table.table[row, :filled].long()
        # Where each attended token stands; selected pages are behind every query.
        first = torch.cat([
            torch.arange(far_begin), torch.full((selected,), -1),
            torch.arange(far_end, far_end + filled - far_begin - selected),
        ]) * page  # fmt: skip
        positions = first[:, None] + torch.arange(page)  # [L, P]
        keys, values = self._keys.read(rows, workspace), self._values.read(rows, workspace)
        # What a page's unwritten end held before may be no number, and counts 0 times.
        values.masked_fill_((positions >= end)[:, :, None], 0)
        far = slice(far_begin, far_begin + selected)
        means = self._means[rows[far]].float()
        flat, group = query.flatten(0, 1), query.shape[1]
        asked = torch.arange(end - len(query), end).repeat_interleave(group)
        parts = [
            coarse_attention(
                flat[i : i + ROWS], keys, values, far, means,
                positions > asked[i : i + ROWS, None, None], self._scale, self._softcap,
            )
            for i in range(0, len(flat), ROWS)
        ]  # fmt: skip
        return torch.cat(parts).view_as(query)


def coarse_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, far: slice,
    means: torch.Tensor, hidden: torch.Tensor, scale: float, softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The coarse merge over ``L`` pages of one KV head.

    A page's weight is moved from its log-sum-exp to its summary by adding the difference to the
    logits of its tokens; one softmax over all tokens then merges everything.

    Args:
        query: ``[m, D]``.
        keys: ``[L, D, P]``.
        values: ``[L, P, D]``.
        far: The pages that are members of their own, K of them; the others are one together.
        means: ``[K, D]`` summaries of those.
        hidden: ``[m, L, P]`` whether a token is not to be seen; false in ``far`` pages.
        scale: Of the dot products.
        softcap: Cap of the logits, 0 for none.

    Returns:
        ``[m, D]``.
    """

    def capped(products: torch.Tensor) -> torch.Tensor:
        logits = products * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    logits = capped(torch.einsum("md,ldp->mlp", query, keys))
    logits.masked_fill_(hidden, -torch.inf)
    inside = logits[:, far]  # [m, K, P]
    weights = capped(query @ means.T) + math.log(keys.shape[2])
    inside += (weights - inside.logsumexp(-1))[:, :, None]
    attention = logits.flatten(1).softmax(-1)
    return attention @ values.flatten(0, 1)
