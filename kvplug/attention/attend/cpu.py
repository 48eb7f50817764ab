"""Attention over a rewritten page table by vLLM's own CPU kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm import _custom_ops as ops
from vllm import envs

from kvplug.attention.attend.packing import find_packing, numbers_of
from kvplug.page_reader import Packing, PageReader
from kvplug.pages import single_head_view

if TYPE_CHECKING:
    from kvplug.page_table import Rows
    from kvplug.workspace import Workspace


class SingleHeadCache(NamedTuple):
    """A layer's cache with every (page, KV head) as a page of its own, as the kernel wants it."""

    keys: torch.Tensor
    """``[pages * Hk, 1, P, D]``; the bytes are the kernel's own packing, not rows of keys."""
    values: torch.Tensor
    """``[pages * Hk, 1, P, D]``, packed likewise."""
    pages: torch.Tensor
    """``[pages * Hk, 2 * P * D]``: keys, then values."""
    scales: tuple[float, float]
    """Of quantised keys and values."""

    @classmethod
    def of(
        cls, kv_cache: torch.Tensor, scales: tuple[float, float] = (1.0, 1.0)
    ) -> SingleHeadCache:
        """Views ``kv_cache`` ``[pages, Hk, P, 2 * D]``; no copy.

        Raises:
            KvplugError: The cache is not contiguous and head-major.
        """
        single = single_head_view(kv_cache)
        rows, _, page, _ = single.shape
        keys, values = single.view(rows, 1, page * 2, -1).chunk(2, dim=2)
        return cls(keys, values, single.view(rows, -1), scales)


class Call(NamedTuple):
    """One call of the kernel: ``n`` sequences of single KV heads."""

    pages: torch.Tensor
    """``[n, width]`` int32 rows of the page table, whatever is in them by then."""
    seq_lens: torch.Tensor
    """``[n]`` int32 tokens that the last query of each attends to."""
    query_start: torch.Tensor
    """``[n + 1]`` int32 first query of each, then the total."""
    split: torch.Tensor
    """The kernel's split of the work over threads."""


_packing_of = lru_cache(maxsize=None)(find_packing)


class CpuAttend:
    """Attends with one kernel call per layer and step.

    Args:
        num_heads: Query heads on this worker, H.
        num_kv_heads: KV heads on this worker, Hk.
        head_dim: D.
        dtype: Of queries and cache.
        isa: The kernel's instruction set, as vLLM chose it for these layers.
        kv_cache_dtype: vLLM's name of the cache's type.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        isa: str,
        kv_cache_dtype: str,
    ) -> None:
        """Holds its arguments."""
        self.num_kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.isa = isa
        self.kv_cache_dtype = kv_cache_dtype

    def reader(self, cache: SingleHeadCache) -> PageReader | None:
        """What reads keys back from ``cache``, as ``[n, D, P]``; None where that cannot be done."""
        packing, (_, _, page, dim) = self._packing(cache), cache.keys.shape
        pages = numbers_of(cache.pages, self.kv_cache_dtype)
        return packing and PageReader(pages, packing.keys, (dim, page), "keys", cache.scales[0])

    def value_reader(self, cache: SingleHeadCache) -> PageReader | None:
        """What reads values, as ``[n, P, D]``; None where that cannot be done."""
        packing, (_, _, page, dim) = self._packing(cache), cache.values.shape
        pages = numbers_of(cache.pages, self.kv_cache_dtype)
        return packing and PageReader(pages, packing.values, (page, dim), "values", cache.scales[1])

    def _packing(self, cache: SingleHeadCache) -> Packing | None:
        page, dim = cache.keys.shape[2:]
        return _packing_of(page, dim, self.dtype, cache.keys.dtype, self.isa, self.kv_cache_dtype)

    def schedule(self, rows: Rows) -> list[Call]:
        """The kernel calls for ``rows``; they hold for every layer of the step.

        Where windows have several tokens, a KV head's queries lie apart from each other, and the
        kernel takes one distance between tokens: then each head is a call. At decode they are
        sequences of one token each, in the order that queries lie in.
        """
        heads = self.num_kv_heads
        if rows.is_decoding or heads == 1:
            starts = torch.arange(len(rows.seq_lens) + 1, dtype=torch.int32)
            start = starts if rows.is_decoding else rows.query_start
            return [self._call(rows.pages, rows.seq_lens, start)]
        lengths = rows.seq_lens.view(-1, heads).T.contiguous()
        return [
            self._call(pages, lengths[h], rows.query_start)
            for h, pages in enumerate(rows.pages.unflatten(0, (-1, heads)).unbind(1))
        ]

    def _call(self, pages: torch.Tensor, lengths: torch.Tensor, start: torch.Tensor) -> Call:
        split = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.group,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=start,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return Call(pages, lengths, start, split)

    def __call__(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        cache: SingleHeadCache,
        calls: list[Call],
        workspace: Workspace,
        *scaling: Any,
    ) -> None:
        """Attends every window to its row of the page table.

        Args:
            query: ``[T, H, D]``.
            output: ``[T, H, D]`` contiguous, written.
            cache: The layer's pages.
            calls: From :meth:`schedule`, with this layer's pages selected.
            workspace: Where the output of a single head lives.
            scaling: Scale of the dot products; cap of the logits, 0 for none; scales of quantised
                keys and values.
        """
        tokens, group, dim = len(query), self.group, self.head_dim
        if len(calls) == 1:
            # Rows of every KV head in turn: so lie the queries of single tokens.
            rows = (-1, group, dim)
            self._kernel(query.reshape(rows), output.view(rows), cache, calls[0], *scaling)
            return
        # The kernel reads queries at any distance, but writes its output in one piece.
        attended = workspace.take("attend.output", (tokens, group, dim), query.dtype)
        heads, outputs = (x.unflatten(1, (len(calls), group)) for x in (query, output))
        for head, call in enumerate(calls):
            self._kernel(heads[:, head], attended, cache, call, *scaling)
            outputs[:, head].copy_(attended)

    def _kernel(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        cache: SingleHeadCache,
        call: Call,
        scale: float,
        softcap: float,
        scales: tuple[float, float],
    ) -> None:
        """One call of the paged kernel over single-head sequences."""
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=cache.keys,
            value_cache=cache.values,
            output=output,
            query_start_loc=call.query_start,
            seq_lens=call.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=call.pages,
            softcap=softcap,
            scheduler_metadata=call.split,
            s_aux=None,
            k_scale=scales[0],
            v_scale=scales[1],
            kv_cache_dtype=self.kv_cache_dtype,
        )
