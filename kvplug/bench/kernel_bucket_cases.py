"""What the gate and the timer call of hash buckets; :mod:`kvplug.bench.kernel_cases` says more."""

from __future__ import annotations

from collections.abc import Callable

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.bucket_scores import bucket_masks, bucket_scores, bucket_scores_reference
from kvplug.kernels.union_ranks import union_ranks, union_ranks_reference

BUCKET_BITS, ROUNDS = 2, 32
"""Of a word, as the recipe `hax` has them."""


def scores_of_buckets(world: World) -> Case:
    """Scores of far pages by hash buckets, for decoded tokens."""
    shape, pages = world.shape, max(world.num_far(), 1)
    words = world.words(world.num_pages, shape.kv_heads, shape.page)
    asked = world.words(shape.batch, shape.kv_heads, shape.group)
    counts, far = world.column([shape.group] * shape.batch), world.far(shape.batch)
    masks = bucket_masks(BUCKET_BITS, ROUNDS, world.device)
    scores = world.scratch(shape.batch, shape.kv_heads, pages)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(words, asked, counts, far, ROUNDS, masks, *out)

    moved = shape.batch * shape.kv_heads * world.num_far() * shape.page * 8
    return Case(
        "bucket_scores", bucket_scores, bucket_scores_reference, call, [scores],
        moved + size_of(asked, scores),
    )  # fmt: skip


def ranks_of_unions(world: World) -> Case:
    """Ranks of far pages by scores and mass of few values, for decoded tokens."""
    shape, pages = world.shape, max(world.num_far(), 1)
    scores = world.whole(shape.batch, shape.kv_heads, pages)
    mass = world.whole(world.num_pages, shape.kv_heads).abs()
    ranks, share = world.scratch(*scores.shape), shape.budget // shape.page // 2

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(scores, share, mass, world.far(shape.batch), *out)

    return Case(
        "union_ranks", union_ranks, union_ranks_reference, call, [ranks], 3 * size_of(scores)
    )


BUCKET_CASES: tuple[Callable[[World], Case], ...] = (scores_of_buckets, ranks_of_unions)
"""Kernels that choose pages by hash hits, and beside them by mass."""
