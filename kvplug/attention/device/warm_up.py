"""Compiles a backend's kernels before the first request, which would wait for them.

vLLM's own warm-up serves short requests, which attend to everything. Here made-up steps go through
one layer as it is, for all layers run the same programs: a prompt that begins, one of its windows
that selects pages, a decoded token, and both in one step. Pages of the cache that nobody holds yet
are taken for it; what is learnt of them is written anew with the first request that gets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from vllm.v1.worker.block_table import get_block_table_width

from kvplug.attention.device.plan import Lengths
from kvplug.pages import sparse_context

if TYPE_CHECKING:
    from kvplug.attention.device.impl import DeviceImpl


class Piece(NamedTuple):
    """Tokens of one request in a made-up step."""

    start: int
    """Tokens before."""
    tokens: int
    is_prompt: bool


def warm_up(impl: DeviceImpl, dtype: torch.dtype, longest: int) -> bool:
    """Runs made-up steps through a layer that is bound.

    Args:
        impl: The layer.
        dtype: Of its queries, keys and values.
        longest: Tokens of the longest context.

    Returns:
        Whether it did: not where contexts or the cache are too small for a window that selects.
    """
    assert impl.pipeline is not None
    assert impl.stages is not None
    shape, window = impl.stages.shape, impl.pipeline.geometry.window
    context = sparse_context(impl.pipeline.geometry)
    width = get_block_table_width(-(-longest // shape.page), shape.page)
    if context + 1 > longest or context // shape.page + 1 > shape.num_pages:
        return False
    prompt, decoded = Piece(context - window, window, True), Piece(context, 1, False)
    steps = ([Piece(0, window, True)], [prompt], [decoded], [decoded, decoded], [decoded, prompt])
    table = torch.arange(width, dtype=torch.int32, device=impl.stages.cache.keys.device)
    table = table.clamp(max=shape.num_pages - 1)
    for pieces in steps:
        _run(impl, pieces, table.repeat(len(pieces), 1), dtype)
    return True


def _run(impl: DeviceImpl, pieces: list[Piece], table: torch.Tensor, dtype: torch.dtype) -> None:
    """One made-up step, without what vLLM's own kernel attends to."""
    assert impl.pipeline is not None
    assert impl.stages is not None
    shape, device = impl.stages.shape, table.device
    lengths = Lengths(
        np.cumsum([0, *(piece.tokens for piece in pieces)], dtype=np.int32),
        np.array([piece.start + piece.tokens for piece in pieces], np.int32),
        np.array([piece.is_prompt for piece in pieces]),
    )
    slots = torch.cat(
        [torch.arange(piece.start, piece.start + piece.tokens, device=device) for piece in pieces]
    )
    plan = impl.pipeline.plan(lengths, table, slots, counted=False)
    assert plan is not None, "a layer that retrieves has a plan"
    total = int(lengths.query_start[-1])
    queries = torch.ones(total, shape.num_heads, shape.head_dim, dtype=dtype, device=device)
    keys = queries[:, : shape.num_kv_heads].contiguous()
    cache = impl.stages.cache
    for side in (cache.keys, cache.values):  # or a hot pool would differ from the cold store
        side[slots // shape.page, slots % shape.page] = keys
    impl.learn(queries, keys, keys, plan)
    if plan.sparse is not None:
        impl.attend_selected(queries, torch.empty_like(queries), plan)
