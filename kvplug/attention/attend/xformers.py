"""Attention over rows of single heads' pages by xformers, where it is installed.

Of its operators in 0.0.35 only its Triton kernel reads pages without another package. That kernel
takes one row of the page table a sequence, and sequences of one number of queries, at most 16 of
them, which see the keys up to themselves. So a window of several tokens goes in pieces, each a
sequence that ends with its own last token.

xformers would choose by the batch how many parts a row is cut into. Here it is always one, and its
block sizes follow from heads and pages: a request gets the same answer alone and in a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvplug.attention.attend.pieces import Pieces, pieces_of
from kvplug.attention.attend.single_heads import MOST_ROWS, SingleHeads
from kvplug.errors import KvplugError
from kvplug.kernels.page_rows import PageRows

if TYPE_CHECKING:
    from kvplug.attention.device.plan import SparseWindows
    from kvplug.kernels.paged_attention import PagedCache


class XformersAttend:
    """Attends to selected pages, the same for every layer of a group.

    Args:
        window: Query tokens of a window.
        scale: Of the dot products.
        operator: See :func:`operator_of`.
    """

    def __init__(self, window: int, scale: float, operator: type[Any]) -> None:
        """Holds its arguments."""
        from xformers.ops import fmha

        self.window, self.scale, self.operator = window, scale, operator
        self._attention = fmha.memory_efficient_attention_forward
        self._mask_type = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        self._masks: dict[tuple[int, ...], Any] = {}
        """By their sizes."""

    def __call__(
        self, queries: torch.Tensor, output: torch.Tensor, cache: PagedCache,
        windows: SparseWindows, rows: PageRows,
    ) -> None:  # fmt: skip
        """Attends every window to its rows; other tokens' outputs are left alone.

        Args:
            queries: ``[T, H, D]`` of the whole step, of the cache's dtype.
            output: ``[T, H, D]``, written at the windows' tokens.
            cache: The layer's keys and values.
            windows: Those of one token first.
            rows: ``S * Hk`` of them.

        Raises:
            KvplugError: The cache lies in a way that xformers cannot read.
        """
        heads = cache.keys.shape[2]
        table = rows.table.unflatten(0, (-1, heads))  # [S, Hk, W]
        lengths, count = rows.lengths.view(-1, heads), windows.singles
        if count:
            tokens = windows.token_start[:count].long()
            places = torch.arange(count, device=tokens.device)
            singles = Pieces(1, tokens, places, table[:count], lengths[:count])
            self._attend(queries, output, cache, singles)
        if count < len(windows):
            pieces = pieces_of(windows, table[count:], lengths[count:], self.window)
            self._attend(queries, output, cache, pieces)

    def _attend(
        self, queries: torch.Tensor, output: torch.Tensor, cache: PagedCache, pieces: Pieces
    ) -> None:
        """One call for every view that the cache needs."""
        # Their number is a constant of the kernel: without rounding, every batch would compile one.
        num, size = 1 << (len(pieces.table) - 1).bit_length(), pieces.size
        heads, page = cache.keys.shape[2], cache.keys.shape[1]
        mine = queries.new_zeros((num * size, *queries.shape[1:]))
        mine.index_copy_(0, pieces.places, queries.index_select(0, pieces.tokens))
        out = torch.empty_like(mine)
        table, lengths = _extended(pieces.table, num), _extended(pieces.lengths, num)
        asking, answers = (
            side.view(num, size, heads, -1, side.shape[-1]).transpose(1, 2) for side in (mine, out)
        )  # [num, Hk, size, G, D]
        views = runs(cache)
        width = heads // len(views)
        for first, view in zip(range(0, heads, width), views, strict=True):
            part = slice(first, first + width)
            mask = self._mask(view.table(table[:, part]), lengths[:, part], size, page)
            query = asking[:, part].reshape(1, -1, *asking.shape[3:])
            keys, values = (
                side.view(1, -1, 1, side.shape[-1]).expand(-1, -1, query.shape[2], -1)
                for side in (view.keys, view.values)
            )
            found = self._attention(query, keys, values, mask, scale=self.scale, op=self.operator)
            answers[:, part] = found.view(answers[:, part].shape)
        output.index_copy_(0, pieces.tokens, out.index_select(0, pieces.places))

    def _mask(self, table: torch.Tensor, lengths: torch.Tensor, size: int, page: int) -> Any:
        """The mask of ``n * h`` sequences, from ``[n, h, W]`` rows and ``[n, h]`` lengths.

        xformers takes lengths from the host, which does not know them, so a mask that was made once
        is given those of the device. Nothing that runs here reads the host's.
        """
        table, lengths = table.flatten(0, 1), lengths.flatten().contiguous()
        count, most = len(table), table.shape[1] * page
        sizes = count, size, most, page
        if sizes not in self._masks:
            self._masks[sizes] = self._mask_type.from_seqlens(
                [size] * count, [most] * count, table, page, device=table.device
            )
        mask = self._masks[sizes]
        known = replace(mask.k_seqinfo, seqlen=lengths)
        return replace(mask, k_seqinfo=known, block_tables=table)


def runs(cache: PagedCache) -> list[SingleHeads]:
    """Views where row ``r`` begins with token ``r * P`` of a single run of tokens.

    One of all heads if a head's page is such a piece of a run, as it is in head-major layouts; else
    one a head.

    Raises:
        KvplugError: Pages lie at other distances, or are too many for the kernel's int32.
    """
    by_page, by_token, by_head, _ = cache.keys.stride()
    unit, caches = cache.keys.shape[1] * by_token, [cache]
    if by_page % unit:
        raise KvplugError(
            f"xformers cannot read pages that lie {by_page} numbers apart, no multiple of the "
            f"{unit} that their tokens take: use attend 'triton'."
        )
    if cache.keys.shape[2] > 1 and by_head % unit:
        sides = zip(cache.keys.split(1, 2), cache.values.split(1, 2), strict=True)
        caches = [cache._replace(keys=keys, values=values) for keys, values in sides]
    views = [SingleHeads.of(part, unit) for part in caches]
    tokens = views[0].keys.shape[:2].numel()
    if tokens >= MOST_ROWS:
        raise KvplugError(
            f"xformers' kernel cannot count the {tokens} places of this cache: use attend 'triton'."
        )
    return views


def _extended(rows: torch.Tensor, num: int) -> torch.Tensor:
    """``rows`` with zeros behind them, ``num`` in all."""
    extended = rows.new_zeros((num, *rows.shape[1:]))
    extended[: len(rows)] = rows
    return extended
