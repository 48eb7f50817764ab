"""Steps that memories watch, made by hand: batches whose every window has an entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvplug.pages import PageGeometry
from kvplug.stage import Memory, Passage
from kvplug.step import Step
from kvplug.windows import cut_windows
from kvplug.workspace import Workspace
from tests.made_up import Piece


def stream_of(geometry: PageGeometry, batch: Sequence[Piece], table: torch.Tensor) -> Step:
    """The batch's step; ``table`` is its ``[B, max_pages]`` block table."""
    arguments = (
        np.cumsum([0, *(piece.tokens for piece in batch)], dtype=np.int32),
        np.array([piece.stop for piece in batch], np.int32),
        np.array([piece.prefilling for piece in batch]),
        geometry,
    )
    stream = cut_windows(*arguments, merge=False)
    return Step(cut_windows(*arguments), table, geometry.most_pages, stream, arguments[2])


def slots_of(geometry: PageGeometry, batch: Sequence[Piece], table: torch.Tensor) -> torch.Tensor:
    """``[T]`` where the step's keys go."""
    page, slots = geometry.page, []
    for row, piece in zip(table.long(), batch, strict=True):
        positions = torch.arange(piece.start, piece.stop)
        slots.append(row[positions // page] * page + positions % page)
    return torch.cat(slots)


def watched(
    memories: Sequence[Memory],
    geometry: PageGeometry,
    batch: Sequence[Piece],
    table: torch.Tensor,
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
) -> Step:
    """Lets memories see one step: they forget what it replaces, then watch.

    Args:
        memories: In the order in which a layer has them.
        geometry: Of the windows.
        batch: The step's pieces.
        table: ``[B, max_pages]``.
        queries: Per piece ``[any, H, D]``, the whole request's.
        keys: Per piece ``[any, Hk, D]``.
    """
    step = stream_of(geometry, batch, table)
    spans = [slice(piece.start, piece.stop) for piece in batch]
    mine = torch.cat([q[span] for q, span in zip(queries, spans, strict=True)])
    new = torch.cat([k[span] for k, span in zip(keys, spans, strict=True)])
    slots = slots_of(geometry, batch, table)
    for memory in memories:
        memory.forget(slots)
    for memory in memories:
        memory.watch(Passage(mine, new, step, Workspace()))
    return step
