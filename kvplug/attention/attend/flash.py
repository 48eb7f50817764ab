"""Attention over rows of single heads' pages by FlashAttention, where vLLM has it.

Its kernel takes one row of the page table a sequence, so every (window, KV head) is a sequence of
the view of single heads, in any layout of vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvplug.attention.attend.single_heads import SingleHeads
from kvplug.errors import KvplugError
from kvplug.kernels.page_rows import PageRows

if TYPE_CHECKING:
    from kvplug.attention.device.plan import SparseWindows
    from kvplug.kernels.paged_attention import PagedCache


class FlashAttend:
    """Attends to selected pages, the same for every layer of a group.

    Args:
        window: Query tokens of a window.
        scale: Of the dot products.
        cap: Of the logits, 0 for none.
        function: vLLM's ``flash_attn_varlen_func``, with its version bound.
    """

    def __init__(self, window: int, scale: float, cap: float, function: Callable[..., Any]) -> None:
        """Holds its arguments."""
        # One split: more of them, chosen by the batch, would make answers depend on it.
        self._attention = partial(
            function, softmax_scale=scale, causal=True, softcap=cap, num_splits=1
        )
        self.window = window

    def __call__(
        self, queries: torch.Tensor, output: torch.Tensor, cache: PagedCache,
        windows: SparseWindows, rows: PageRows,
    ) -> None:  # fmt: skip
        """Attends every window to its rows; other tokens' outputs are left alone.

        Args:
            queries: ``[T, H, D]`` of the whole step.
            output: ``[T, H, D]``, written at the windows' tokens.
            cache: The layer's keys and values.
            windows: Those of one token first.
            rows: ``S * Hk`` of them; what is behind a row's pages names pages too.
        """
        heads, page = cache.keys.shape[2], cache.keys.shape[1]
        single = SingleHeads.of(cache)
        table = single.table(rows.table.unflatten(0, (-1, heads)))  # [S, Hk, W]
        lengths = rows.lengths.view(-1, heads)
        attention = partial(
            self._attention, k=single.keys, v=single.values, max_seqlen_k=table.shape[2] * page
        )
        count = windows.singles
        if count:
            tokens = windows.token_start[:count].long()
            mine = queries.index_select(0, tokens).unflatten(1, (heads, -1)).flatten(0, 1)
            starts = torch.arange(len(mine) + 1, dtype=torch.int32, device=mine.device)
            out = torch.empty_like(mine)  # [n * Hk, G, D]
            attention(
                q=mine, out=out, cu_seqlens_q=starts, max_seqlen_q=1,
                seqused_k=lengths[:count].flatten(), block_table=table[:count].flatten(0, 1),
            )  # fmt: skip
            output.index_copy_(0, tokens, out.unflatten(0, (-1, heads)).flatten(1, 2))
        if count < len(windows):
            tokens = windows.tokens.long()
            mine = queries.index_select(0, tokens).unflatten(1, (heads, -1))  # [n, Hk, G, D]
            out, by_head = torch.empty_like(mine), lengths[count:].T.contiguous()
            # A head's queries lie apart from each other: each head is a call.
            for head in range(heads):
                attention(
                    q=mine[:, head], out=out[:, head], cu_seqlens_q=windows.query_start,
                    max_seqlen_q=self.window, seqused_k=by_head[head],
                    block_table=table[count:, head],
                )  # fmt: skip
            output.index_copy_(0, tokens, out.flatten(1, 2))


def vllm_function(head_dim: int, has_cap: bool) -> Callable[..., Any]:
    """vLLM's FlashAttention for heads of a size, with the version that it chooses.

    Raises:
        KvplugError: vLLM has none here.
    """
    from vllm.v1.attention.backends import fa_utils

    if not fa_utils.is_flash_attn_varlen_func_available():
        raise KvplugError("vLLM has no FlashAttention here: use attend 'triton'.")
    version = fa_utils.get_flash_attn_version(head_size=head_dim, requires_softcap=has_cap)
    if version is None:
        raise KvplugError(f"vLLM has no FlashAttention for heads of {head_dim}: use 'triton'.")
    return partial(fa_utils.flash_attn_varlen_func, fa_version=version)
