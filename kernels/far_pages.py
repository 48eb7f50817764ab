"""Which far pages a window may retrieve, as tensors on the device: what page scores are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices


class FarPages(NamedTuple):
    """Far pages of the ``S`` windows of a step; :class:`kvplug.windows.Windows` says more."""

    block_table: torch.Tensor
    """``[B, max_pages]`` int32 physical pages; rows may be strided."""
    request: torch.Tensor
    """``[S]`` int32 row of the block table."""
    begin: torch.Tensor
    """``[S]`` int32 first far page."""
    end: torch.Tensor
    """``[S]`` int32 page after the last far one."""

    def check(self, counts: torch.Tensor, scores: torch.Tensor, heads: int) -> None:
        """Refuses what kernels would read wrongly.

        Args:
            counts: ``[S]`` int32 probes of each window.
            scores: ``[S, Hk, N]`` float32.
            heads: Hk.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        check("scores", scores, ("S", heads, "N"), torch.float32)
        windows = scores.shape[0]
        check("block_table", self.block_table, ("B", "max_pages"), torch.int32, contiguous=False)
        for name, column in (("counts", counts), *zip(self._fields[1:], self[1:], strict=True)):
            check(name, column, (windows,), torch.int32)
        check_devices(scores=scores, counts=counts, **self._asdict())

    def pages(self, window: int) -> torch.Tensor:
        """``[N]`` int64 physical far pages of a window; waits for the device: for references."""
        row = self.block_table[int(self.request[window])]
        return row[int(self.begin[window]) : int(self.end[window])].long()


@triton.jit
def far_limit(p_counts, p_begin, p_end, i_s):  # type: ignore[no-untyped-def]
    """Number of a window's far pages; a window without probes has none."""
    limit = tl.load(p_end + i_s) - tl.load(p_begin + i_s)
    return tl.where(tl.load(p_counts + i_s) > 0, limit, 0)


@triton.jit
def far_pages(  # type: ignore[no-untyped-def]
    p_table, p_request, p_begin, table_stride, i_s, o_n, m_n
):
    """``[BN]`` int64 physical pages of a window's far pages ``o_n``."""
    row = tl.load(p_request + i_s).to(tl.int64) * table_stride + tl.load(p_begin + i_s)
    return tl.load(p_table + row + o_n, mask=m_n, other=0).to(tl.int64)
