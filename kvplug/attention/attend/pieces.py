"""Windows of several tokens in pieces of one length, for a kernel that takes no other sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from kvplug.attention.device.plan import SparseWindows

LONGEST = 16
"""Most queries of a sequence that xformers allows in a causal mask."""


class Pieces(NamedTuple):
    """``n`` runs of up to ``size`` tokens of a window, each ending where its row's length says."""

    size: int
    tokens: torch.Tensor
    """``[Ts]`` int64 places of their tokens in the step."""
    places: torch.Tensor
    """``[Ts]`` int64 places of these tokens in ``n`` runs of ``size``, each filled from its end."""
    table: torch.Tensor
    """``[n, Hk, W]`` int32 pages."""
    lengths: torch.Tensor
    """``[n, Hk]`` int32 tokens of a row up to the piece's last; 0 or less where it has none."""


def pieces_of(
    windows: SparseWindows, table: torch.Tensor, lengths: torch.Tensor, window: int
) -> Pieces:
    """Windows of several tokens as pieces of :data:`LONGEST`, counted from a window's end.

    Every window gets as many as the longest one may need, since only the device knows lengths.

    Args:
        windows: Of one token and of several.
        table: ``[n, Hk, W]`` of the latter.
        lengths: ``[n, Hk]`` of the latter.
        window: Most tokens of one.
    """
    size, each = LONGEST, -(-window // LONGEST)
    ends, tokens = windows.query_start[1:], windows.tokens.long()
    order = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
    which = torch.searchsorted(ends, order, right=True)
    places = (which + 1) * (each * size) - (ends[which] - order)
    behind = torch.arange(each - 1, -1, -1, dtype=torch.int32, device=tokens.device) * size
    is_used = behind < windows.num_tokens[windows.singles :, None]  # [n, each]
    ending = (lengths[:, None] - behind[:, None]) * is_used[..., None]
    return Pieces(
        size, tokens, places, table[:, None].expand(-1, each, -1, -1).flatten(0, 1),
        ending.flatten(0, 1),
    )  # fmt: skip
