"""Chunks of pages that a step completes, from lengths alone."""

from __future__ import annotations

import numpy as np
import torch

from kvplug.attention.device.plan import Lengths
from kvplug.attention.device.send import send_columns
from kvplug.kernels.chunk_means import ChunkEnds


def chunk_ends(
    lengths: Lengths, page: int, per_chunk: int, device: torch.device
) -> ChunkEnds | None:
    """The chunks whose last token is one of the step's, request by request; None without one.

    Most steps that decode complete none, and copy nothing.

    Args:
        lengths: Of the batch, on the host.
        page: Tokens per page.
        per_chunk: Pages of a chunk.
        device: Where the result lies.
    """
    size = page * per_chunk
    before = lengths.seq_lens - np.diff(lengths.query_start)
    first, last = before // size, lengths.seq_lens // size
    numbers = last - first
    total = int(numbers.sum())
    if not total:
        return None
    request = np.repeat(np.arange(len(numbers)), numbers)
    chunks = np.arange(total) + np.repeat(last - np.cumsum(numbers), numbers)
    return ChunkEnds(*send_columns([request, (chunks + 1) * per_chunk], device))
