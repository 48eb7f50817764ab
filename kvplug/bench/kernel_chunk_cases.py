"""What the gate and the timer call of chunks of pages; :mod:`kvplug.bench.kernel_cases` says more.

Means are whole numbers, so chunks have one ranking and scores one value, whatever the order of
sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.chunk_means import ChunkEnds, chunk_means, chunk_means_reference
from kvplug.kernels.chunk_scores import ChunkScratch, Looks, chunk_scores, chunk_scores_reference

PER_CHUNK, SPREAD = 8, 4
"""Pages of a chunk, and budgets that chunks hold, as the recipe `hcam` has them."""


def means_of_chunks(world: World) -> Case:
    """Means of the chunks that a step of a prompt completes in every request."""
    shape = world.shape
    per_chunk = min(PER_CHUNK, shape.pages)
    means = world.whole(world.num_pages, shape.kv_heads, shape.dim, dtype=torch.bfloat16)
    last = shape.pages // per_chunk
    first = max(last - max(shape.chunk // (shape.page * per_chunk), 1), 0)
    places = [(b, (c + 1) * per_chunk) for b in range(shape.batch) for c in range(first, last)]
    ends = ChunkEnds(*(world.column(column) for column in zip(*places, strict=True)))
    chunks = world.scratch(*means.shape, dtype=torch.bfloat16)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(means, world.block_table, ends, per_chunk, *out)

    moved = len(places) * (per_chunk + 1) * shape.kv_heads * shape.dim * 2
    return Case("chunk_means", chunk_means, chunk_means_reference, call, [chunks], moved)


def scores_of_chunks(world: World) -> Case:
    """Scores of far pages by their means, of the best chunks only, for decoded tokens."""
    shape, pages = world.shape, max(world.num_far(), 1)
    size = world.num_pages, shape.kv_heads, shape.dim
    means, chunks = (world.whole(*size, dtype=torch.bfloat16) for _ in range(2))
    vectors = world.whole(shape.batch, shape.kv_heads, shape.group, shape.dim, dtype=shape.dtype)
    counts, far = world.column([shape.group] * shape.batch), world.far(shape.batch)
    per_chunk = PER_CHUNK if pages > 2 * PER_CHUNK else 2
    whole = pages // per_chunk
    wanted = max(SPREAD * shape.budget // (shape.page * per_chunk), 1)
    looks = Looks(per_chunk, min(wanted, max(whole // 2, 1)))
    rows = shape.batch, shape.kv_heads
    scratch = ChunkScratch(
        world.scratch(*rows, whole), world.scratch(*rows, whole, dtype=torch.uint8)
    )
    scores = world.scratch(*rows, pages)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(means, chunks, vectors, counts, far, shape.dim**-0.5, looks, scratch, *out)

    looked = whole + looks.chunks * per_chunk
    moved = shape.batch * shape.kv_heads * looked * shape.dim * 2 + size_of(vectors, scores)
    return Case("chunk_scores", chunk_scores, chunk_scores_reference, call, [scores], moved)


CHUNK_CASES: tuple[Callable[[World], Case], ...] = (means_of_chunks, scores_of_chunks)
"""Kernels that choose pages by chunks of them."""
