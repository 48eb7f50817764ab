"""Rows of the page table that attention reads: ``sinks | selected far pages | local pages``.

The twin on CPU is :class:`kvplug.page_table.PageTable`. Row ``s * Hk + h`` is window ``s`` as KV
head ``h`` sees it. It holds plain physical pages, since the attention kernel knows its head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages

BLOCK = 128
"""Pages of a row that a program copies at a time."""


class PageRows(NamedTuple):
    """Sequences to attend to, one for every window and KV head."""

    table: torch.Tensor
    """``[S * Hk, W]`` int32 physical pages in order."""
    lengths: torch.Tensor
    """``[S * Hk]`` int32 tokens, the window's own included; 0: the row attends to nothing."""


class Contexts(NamedTuple):
    """Contexts of the ``S`` windows of a step, and where their regions lie."""

    far: FarPages
    """Sinks end where far pages begin, local pages begin where these end."""
    context_end: torch.Tensor
    """``[S]`` int32 tokens of context, the window's own included; 0 in an unused row."""
    page: int
    """P."""

    def check(self, heads: int, rows: PageRows) -> None:
        """Refuses what kernels would read or write wrongly.

        Args:
            heads: Hk.
            rows: To be written.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device, or the page size is
                not supported.
        """
        far = self.far
        check("block_table", far.block_table, ("B", "max_pages"), torch.int32, contiguous=False)
        check("context_end", self.context_end, ("S",), torch.int32)
        windows = len(self.context_end)
        for name, column in zip(far._fields[1:], far[1:], strict=True):
            check(name, column, (windows,), torch.int32)
        check("table", rows.table, (windows * heads, "W"), torch.int32)
        check("lengths", rows.lengths, (windows * heads,), torch.int32)
        check_devices(context_end=self.context_end, **far._asdict(), **rows._asdict())
        check_page(self.page)


@triton.jit
def write_ends(  # type: ignore[no-untyped-def]
    p_pages, p_row, p_length, begin, end, context_end, chosen, page, width, BLOCK_W: tl.constexpr
):
    """Writes sinks, local pages and length of a row around ``chosen`` far pages.

    Returns:
        Whether the row holds them all; one that does not is left with a length of 0.
    """
    num_local = tl.maximum(tl.cdiv(context_end, page) - end, 0)
    fits = begin + chosen + num_local <= width
    tl.store(p_length, tl.where(fits, context_end - (end - begin - chosen) * page, 0))
    if fits:
        for i in range(0, begin, BLOCK_W):
            o_n = i + tl.arange(0, BLOCK_W)
            tl.store(p_row + o_n, tl.load(p_pages + o_n, mask=o_n < begin), mask=o_n < begin)
        for i in range(0, num_local, BLOCK_W):
            o_n = i + tl.arange(0, BLOCK_W)
            b_pages = tl.load(p_pages + end + o_n, mask=o_n < num_local)
            tl.store(p_row + begin + chosen + o_n, b_pages, mask=o_n < num_local)
    return fits


@triton.jit
def _page_rows_kernel(  # type: ignore[no-untyped-def]
    p_selected, p_counts, p_table, p_request, p_begin, p_end, p_context, p_rows, p_lengths,
    table_stride, most, page, width, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row: the selection is translated to physical pages between sinks and local pages."""
    i_s = tl.program_id(0)
    i_row = (i_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    begin = tl.load(p_begin + i_s)
    chosen = tl.load(p_counts + i_row)
    p_pages = p_table + tl.load(p_request + i_s).to(tl.int64) * table_stride
    p_row = p_rows + i_row * width
    fits = write_ends(
        p_pages, p_row, p_lengths + i_row, begin, tl.load(p_end + i_s), tl.load(p_context + i_s),
        chosen, page, width, BLOCK_W,
    )  # fmt: skip
    if fits:
        for i in range(0, chosen, BLOCK_W):
            o_k = i + tl.arange(0, BLOCK_W)
            m_k = o_k < chosen
            b_logical = tl.load(p_selected + i_row * most + o_k, mask=m_k, other=0)  # [BW]
            b_pages = tl.load(p_pages + b_logical, mask=m_k)
            tl.store(p_row + begin + o_k, b_pages, mask=m_k)


def page_rows(
    selected: torch.Tensor, counts: torch.Tensor, contexts: Contexts, rows: PageRows
) -> None:
    """Writes the rows of selections that were made elsewhere.

    A row that does not fit W pages gets a length of 0. What is behind a row's pages is left alone.

    Args:
        selected: ``[S, Hk, K]`` int32 logical far pages, ascending, as
            :meth:`kvplug.select.base.Select.select` writes them.
        counts: ``[S, Hk]`` int32, how many of them each row has, at most K.
        contexts: The windows' contexts; one without far pages attends to all of its pages.
        rows: Written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the page size is not
            supported.
    """
    check("counts", counts, ("S", "Hk"), torch.int32)
    windows, heads = counts.shape
    check("selected", selected, (windows, heads, "K"), torch.int32)
    check("context_end", contexts.context_end, (windows,), torch.int32)
    contexts.check(heads, rows)
    check_devices(selected=selected, counts=counts, table=rows.table)
    if not windows:
        return
    _page_rows_kernel[(windows, heads)](
        selected, counts, *contexts.far, contexts.context_end, *rows,
        contexts.far.block_table.stride(0), selected.shape[2], contexts.page, rows.table.shape[1],
        BLOCK_W=BLOCK,
    )  # fmt: skip


def page_rows_reference(
    selected: torch.Tensor, counts: torch.Tensor, contexts: Contexts, rows: PageRows
) -> None:
    """Twin of :func:`page_rows` in plain torch."""
    far, page = contexts.far, contexts.page
    for s, (context_end, begin, end) in enumerate(
        zip(contexts.context_end.tolist(), far.begin.tolist(), far.end.tolist(), strict=True)
    ):
        pages = far.block_table[int(far.request[s])]
        num_pages = -(-context_end // page)
        for head, chosen in enumerate(counts[s].tolist()):
            logical = selected[s, head, :chosen].long()
            row = torch.cat([pages[:begin], pages[logical], pages[end:num_pages]])
            i_row, fits = s * counts.shape[1] + head, len(row) <= rows.table.shape[1]
            if fits:
                rows.table[i_row, : len(row)] = row
            unused = num_pages * page - context_end
            rows.lengths[i_row] = len(row) * page - unused if fits else 0


COMPILED = (
    Variant(
        _page_rows_kernel,
        "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32",
        {"BLOCK_W": BLOCK},
    ),
)
"""For :mod:`kvplug.kernels.compile_check`."""
