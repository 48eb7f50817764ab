"""Where windows find what their requests carry: logical pages, and the block table they lie in.

Which pages they are follows from lengths (:func:`kvplug.carry.carried`), so the host knows them;
where they lie only the device does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices


def check_carried(
    block_table: torch.Tensor, request: torch.Tensor, windows: int, **logical: torch.Tensor
) -> None:
    """Refuses what :func:`carried_page` would read wrongly.

    Args:
        block_table: ``[B, max_pages]`` int32; rows may be strided.
        request: ``[n]`` int32 row of each window.
        windows: n.
        logical: Columns of logical pages, ``[n]`` int32 each, by name.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("block_table", block_table, ("B", "max_pages"), torch.int32, contiguous=False)
    columns = {"request": request, **logical}
    for name, column in columns.items():
        check(name, column, (windows,), torch.int32)
    check_devices(block_table=block_table, **columns)


def physical_page(block_table: torch.Tensor, request: int, logical: int) -> int:
    """A logical page's place, or the negative number itself; waits for the device: for twins."""
    return int(block_table[request, logical]) if logical >= 0 else logical


@triton.jit
def carried_page(p_table, table_stride, p_request, p_logical, i_s):  # type: ignore[no-untyped-def]
    """Physical page of window ``i_s``, int64; -1 where the logical one is negative."""
    logical = tl.load(p_logical + i_s)
    row = tl.load(p_request + i_s).to(tl.int64) * table_stride
    page = tl.load(p_table + row + tl.maximum(logical, 0)).to(tl.int64)
    return tl.where(logical < 0, -1, page)
