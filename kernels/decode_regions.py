"""Regions of contexts that end in one decoded token, found on the device from their lengths.

The twin on CPU is :func:`kvplug.windows.cut_windows`, for windows of one token. A context that
retrieves has ``sinks | far pages | local pages``; one that attends to everything has no far pages,
and all of its pages count as local.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page, require
from kvplug.kernels.compile_check import Variant

BLOCK = 128
"""Requests of a program."""


class Regions(NamedTuple):
    """Sizes of a context's regions, as :class:`kvplug.pages.PageGeometry` has them."""

    page: int
    """Tokens per page, P."""
    sink_pages: int
    """Pages at the start of a context that are always attended."""
    local: int
    """Tokens before the query, itself included, that are always attended."""
    budget_pages: int
    """Far pages attended per request and KV head."""
    dense_below: int
    """Contexts of up to this many tokens attend to everything."""

    def check(self) -> None:
        """Refuses sizes that make no regions.

        Raises:
            ValueError: The page size is not supported, or a size is negative or local is 0.
        """
        check_page(self.page)
        require(
            min(self.sink_pages, self.budget_pages, self.dense_below, self.local - 1) >= 0,
            f"Regions need local >= 1 and no negative size, not {self}.",
        )

    def row_pages(self) -> int:
        """Most pages that a context attends to, whatever its length."""
        local_pages = -(-(self.local - 1) // self.page) + 1
        dense_pages = -(-self.dense_below // self.page)
        return max(self.sink_pages + self.budget_pages + local_pages, dense_pages)

    def far_pages(self, longest: int) -> int:
        """Far pages of a context of ``longest`` tokens that retrieves, at least 1."""
        return max((longest - self.local) // self.page - self.sink_pages, 1)


@triton.jit
def _regions_kernel(  # type: ignore[no-untyped-def]
    p_lengths, p_begin, p_end, p_counts, requests, page, sinks, local, budget, dense_below, group,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Regions of BLOCK requests."""
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < requests
    b_length = tl.load(p_lengths + o_b, mask=m_b, other=0)  # [B]
    b_end = tl.maximum(b_length - local, 0) // page
    m_sparse = (b_end - sinks > budget) & (b_length > dense_below)
    tl.store(p_begin + o_b, tl.where(m_sparse, sinks, 0), mask=m_b)
    tl.store(p_end + o_b, tl.where(m_sparse, b_end, 0), mask=m_b)
    tl.store(p_counts + o_b, tl.where(m_sparse, group, 0), mask=m_b)


def decode_regions(
    lengths: torch.Tensor, regions: Regions, group: int,
    begin: torch.Tensor, end: torch.Tensor, counts: torch.Tensor,
) -> None:  # fmt: skip
    """Finds each request's far pages, and how many probes look for them.

    Args:
        lengths: ``[B]`` int32 tokens of context, the decoded one included; 0 in an unused row.
        regions: Sizes.
        group: G, probes of a request that retrieves.
        begin: ``[B]`` int32, written: first far page; 0 where everything is attended.
        end: ``[B]`` int32, written: page after the last far one; 0 where everything is attended.
        counts: ``[B]`` int32, written: G, or 0 where everything is attended.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a size is wrong.
    """
    check("lengths", lengths, ("B",), torch.int32)
    for name, column in (("begin", begin), ("end", end), ("counts", counts)):
        check(name, column, (len(lengths),), torch.int32)
    check_devices(lengths=lengths, begin=begin, end=end, counts=counts)
    regions.check()
    if not len(lengths):
        return
    _regions_kernel[(triton.cdiv(len(lengths), BLOCK),)](
        lengths, begin, end, counts, len(lengths), *regions, group, BLOCK=BLOCK
    )


def decode_regions_reference(
    lengths: torch.Tensor, regions: Regions, group: int,
    begin: torch.Tensor, end: torch.Tensor, counts: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`decode_regions` in plain torch."""
    last = (lengths - regions.local).clamp(min=0) // regions.page
    is_sparse = (last - regions.sink_pages > regions.budget_pages) & (lengths > regions.dense_below)
    begin.copy_(is_sparse * regions.sink_pages)
    end.copy_(is_sparse * last)
    counts.copy_(is_sparse * group)


COMPILED = (
    Variant(
        _regions_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32 i32 i32 i32 i32", {"BLOCK": BLOCK}
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
