"""Attention over a rewritten page table by vLLM's own CPU kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm import _custom_ops as ops
from vllm import envs

from kvplug.attention.attend.packing import find_packing
from kvplug.page_reader import Packing, PageReader
from kvplug.pages import single_head_view

if TYPE_CHECKING:
    from kvplug.page_table import PageTable
    from kvplug.pipeline import Plan
    from kvplug.workspace import Workspace


class SingleHeadCache(NamedTuple):
    """A layer's cache with every (page, KV head) as a page of its own, as the kernel wants it."""

    keys: torch.Tensor
    """``[pages * Hk, 1, P, D]``; the bytes are the kernel's own packing, not rows of keys."""
    values: torch.Tensor
    """``[pages * Hk, 1, P, D]``, packed likewise."""
    pages: torch.Tensor
    """``[pages * Hk, 2 * P * D]``: keys, then values."""

    @classmethod
    def of(cls, kv_cache: torch.Tensor) -> SingleHeadCache:
        """Views ``kv_cache`` ``[pages, Hk, P, 2 * D]``; no copy.

        Raises:
            KvplugError: The cache is not contiguous and head-major.
        """
        single = single_head_view(kv_cache)
        rows, _, page, _ = single.shape
        keys, values = single.view(rows, 1, page * 2, -1).chunk(2, dim=2)
        return cls(keys, values, single.view(rows, -1))


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
        return packing and PageReader(cache.pages, packing.keys, (dim, page), "keys")

    def value_reader(self, cache: SingleHeadCache) -> PageReader | None:
        """What reads values, as ``[n, P, D]``; None where that cannot be done."""
        packing, (_, _, page, dim) = self._packing(cache), cache.values.shape
        return packing and PageReader(cache.pages, packing.values, (page, dim), "values")

    def _packing(self, cache: SingleHeadCache) -> Packing | None:
        page, dim = cache.keys.shape[2:]
        return _packing_of(page, dim, cache.keys.dtype, self.isa)

    def schedule(self, table: PageTable) -> torch.Tensor:
        """The kernel's work split for ``table``; it holds for every layer of the step."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=table.seq_lens.shape[0],
            num_heads=self.group,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=table.seq_lens,
            dtype=self.dtype,
            query_start_loc=table.query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def __call__(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        cache: SingleHeadCache,
        plan: Plan,
        schedule: torch.Tensor,
        workspace: Workspace,
        scale: float,
        softcap: float,
        scales: tuple[float, float],
    ) -> None:
        """Attends every window to its row of the page table.

        Args:
            query: ``[T, H, D]``.
            output: ``[T, H, D]`` contiguous, written.
            cache: The layer's pages.
            plan: The step's plan, with this layer's pages selected.
            schedule: From :meth:`schedule`.
            workspace: Where reordered queries live.
            scale: Of the dot products.
            softcap: Cap of the logits, 0 for none.
            scales: Of quantised keys and values.
        """
        rows, width = query.shape[0] * self.num_kv_heads, self.group * self.head_dim
        shape = (rows, self.group, self.head_dim)
        token_major = query.reshape(rows, width)
        if plan.order is None:
            self._kernel(
                token_major.view(shape), output.view(shape), cache, plan, schedule, scale,
                softcap, scales,
            )  # fmt: skip
            return
        head_major = workspace.take("attend.query", (rows, width), query.dtype)
        torch.index_select(token_major, 0, plan.order, out=head_major)
        attended = workspace.take("attend.output", (rows, width), query.dtype)
        self._kernel(
            head_major.view(shape), attended.view(shape), cache, plan, schedule, scale, softcap,
            scales,
        )  # fmt: skip
        output.view(rows, width).index_copy_(0, plan.order, attended)

    def _kernel(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        cache: SingleHeadCache,
        plan: Plan,
        schedule: torch.Tensor,
        *scaling: Any,
    ) -> None:
        """One call of the paged kernel over ``S * Hk`` single-head sequences."""
        scale, softcap, (k_scale, v_scale) = scaling
        table = plan.table
        assert table is not None
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=cache.keys,
            value_cache=cache.values,
            output=output,
            query_start_loc=table.query_start,
            seq_lens=table.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table.table,
            softcap=softcap,
            scheduler_metadata=schedule,
            s_aux=None,
            k_scale=k_scale,
            v_scale=v_scale,
            kv_cache_dtype=self.kv_cache_dtype,
        )
