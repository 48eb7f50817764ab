"""What the correctness gate and the timer call: every kernel on inputs of a given shape.

A case is called with a kernel or with its twin, on outputs of its own. Inputs are such that exact
kernels have one right answer: numbers that are hashed are small whole numbers, whose sums do not
depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.activation import Seen, activation_means, activation_means_reference
from kvplug.kernels.bound_scores import (
    bound_scores,
    bound_scores_reference,
    mean_scores,
    mean_scores_reference,
)
from kvplug.kernels.hash_scores import Several, hash_scores, hash_scores_reference
from kvplug.kernels.join_probes import ProbeVectors, join_probes, join_probes_reference
from kvplug.kernels.last_activated import last_activated, last_activated_reference
from kvplug.kernels.mean_query import mean_query, mean_query_reference
from kvplug.kernels.page_statistics import (
    filled_page_statistics,
    filled_page_statistics_reference,
    page_statistics,
    page_statistics_reference,
)
from kvplug.kernels.query_statistics import Carried, query_statistics, query_statistics_reference
from kvplug.kernels.sign_hash import (
    sign_hash,
    sign_hash_probes,
    sign_hash_probes_reference,
    sign_hash_reference,
)

LAST, ACTIVE = 4, 4
"""Tokens of a window that probe, as the recipe `simhash` has them."""


def hash_keys(world: World) -> Case:
    """Sign hashes of a prompt's new keys."""
    shape = world.shape
    tokens = min(shape.tokens, shape.chunk)
    keys = world.whole(tokens, shape.kv_heads, shape.dim, dtype=shape.dtype)
    slots = torch.arange(tokens, device=world.device) + shape.page
    slots[::97] = -1
    planes = world.whole(shape.kv_heads, shape.dim, 64)
    words = world.words(tokens // shape.page + 2, shape.kv_heads, shape.page)
    moved = size_of(keys, slots, planes) + tokens * shape.kv_heads * 8

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, slots, planes, *out)

    return Case("sign_hash", sign_hash, sign_hash_reference, call, [words], moved)


def hash_probes(world: World) -> Case:
    """Sign hashes of the queries of decoded tokens."""
    shape = world.shape
    size = (shape.batch, shape.kv_heads, shape.group)
    vectors = world.whole(*size, shape.dim, dtype=shape.dtype)
    planes = world.whole(shape.kv_heads, shape.dim, 64)
    words = world.words(*size)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(vectors, planes, *out)

    moved = size_of(vectors, planes, words)
    return Case(
        "sign_hash_probes", sign_hash_probes, sign_hash_probes_reference, call, [words], moved
    )


def scores_of_hashes(world: World, *, of_prompt: bool = False) -> Case:
    """Scores of far pages by sign hashes, for decoded tokens or for windows of a prompt."""
    shape = world.shape
    windows = max(min(shape.tokens, shape.chunk) // shape.window, 1) if of_prompt else shape.batch
    probes = shape.group * (LAST + ACTIVE if of_prompt else 1)
    pages, heads = max(world.num_far(), 1), shape.kv_heads
    words = world.words(world.num_pages, heads, shape.page)
    asked, far = world.words(windows, heads, probes), world.far(windows)
    counts = world.column([probes] * windows)
    scores = world.scratch(windows, heads, pages)
    several = Several(
        torch.ones(windows, dtype=torch.bool, device=world.device),
        world.scratch(windows, heads, probes, pages, dtype=torch.uint8),
        world.scratch(windows, heads, probes, dtype=torch.int32),
    ) if of_prompt else None  # fmt: skip

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(words, asked, counts, far, *out, several)

    moved = windows * heads * world.num_far() * shape.page * 8 + size_of(asked, scores)
    name = "hash_scores, prompt" if of_prompt else "hash_scores, decode"
    return Case(name, hash_scores, hash_scores_reference, call, [scores], moved)


def scores_of_prompt_hashes(world: World) -> Case:
    """See :func:`scores_of_hashes`."""
    return scores_of_hashes(world, of_prompt=True)


def statistics_of_pages(world: World) -> Case:
    """Means and bounds of a prompt's new pages."""
    shape = world.shape
    count = max(min(shape.tokens, shape.chunk) // shape.page, 1)
    size = (count, shape.kv_heads, shape.page, shape.dim)
    keys = world.whole(*size, dtype=shape.dtype).transpose(1, 2)  # [pages, P, Hk, D]
    pages = torch.arange(count, device=world.device).flip(0)
    means = world.scratch(count, shape.kv_heads, shape.dim, dtype=torch.bfloat16)
    bounds = world.scratch(count, shape.kv_heads, 2, shape.dim, dtype=torch.bfloat16)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, pages, *out)

    return Case(
        "page_statistics", page_statistics, page_statistics_reference, call, [means, bounds],
        size_of(keys, pages, means, bounds),
    )  # fmt: skip


def bounds_of_filled_pages(world: World) -> Case:
    """Bounds of the pages that a prompt's new tokens fill, the first of them begun before."""
    shape = world.shape
    tokens = min(shape.tokens, shape.chunk)
    size = (tokens // shape.page + 2, shape.kv_heads, shape.page, shape.dim)
    keys = world.whole(*size, dtype=shape.dtype).transpose(1, 2)  # [pages, P, Hk, D]
    slots = torch.arange(tokens, device=world.device) + shape.page // 2
    slots[shape.page // 2 - 1 :: 3 * shape.page] = -1  # every third page is never filled
    bounds = world.scratch(size[0], shape.kv_heads, 2, shape.dim, dtype=torch.bfloat16)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, slots, None, *out)

    return Case(
        "page_statistics, filled", filled_page_statistics, filled_page_statistics_reference, call,
        [bounds], size_of(keys, slots, bounds),
    )  # fmt: skip


def scores_of_bounds(world: World, *, of_means: bool = False) -> Case:
    """Scores of far pages by bounds or means of their keys, for decoded tokens."""
    shape = world.shape
    sides = () if of_means else (2,)
    size = (world.num_pages, shape.kv_heads, *sides, shape.dim)
    summaries = world.normal(*size, dtype=torch.bfloat16)
    if not of_means:
        summaries = summaries.sort(2).values.contiguous()
    vectors = world.normal(shape.batch, shape.kv_heads, shape.group, shape.dim, dtype=shape.dtype)
    counts, far = world.column([shape.group] * shape.batch), world.far(shape.batch)
    scores = world.scratch(shape.batch, shape.kv_heads, max(world.num_far(), 1))
    row = shape.dim * 2 * (1 if of_means else 2)
    moved = shape.batch * shape.kv_heads * world.num_far() * row + size_of(vectors, scores)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(summaries, vectors, counts, far, shape.dim**-0.5, *out)

    kernel, twin = (
        (mean_scores, mean_scores_reference) if of_means else (bound_scores, bound_scores_reference)
    )
    return Case(kernel.__name__, kernel, twin, call, [scores], moved, is_exact=False)


def scores_of_means(world: World) -> Case:
    """See :func:`scores_of_bounds`."""
    return scores_of_bounds(world, of_means=True)


def probes_of_windows(world: World) -> Case:
    """The last and most activated queries of a prompt's windows."""
    shape, windows = world.shape, world.query_windows()
    count, probes = len(windows.num_tokens), shape.group * (LAST + ACTIVE)
    bias = world.scratch(count, shape.heads, shape.window)
    size = (count, shape.kv_heads, probes, shape.dim)
    vectors = world.scratch(*size, dtype=shape.dtype)
    counts = world.scratch(count, dtype=torch.int32)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, LAST, ACTIVE, bias, *out)

    return Case(
        "last_activated", last_activated, last_activated_reference, call, [vectors, counts],
        size_of(windows.queries, vectors),
    )  # fmt: skip


def mean_queries_of_windows(world: World) -> Case:
    """Mean queries of a prompt's windows."""
    shape, windows = world.shape, world.query_windows()
    count = len(windows.num_tokens)
    vectors = world.scratch(count, shape.kv_heads, shape.group, shape.dim)
    counts = world.scratch(count, dtype=torch.int32)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, *out)

    return Case(
        "mean_query", mean_query, mean_query_reference, call, [vectors, counts],
        size_of(windows.queries, vectors), is_exact=False,
    )  # fmt: skip


def states_of(world: World, pages: int) -> list[torch.Tensor]:
    """Means, variances and counts of as many pages."""
    shape = world.shape
    size = (pages, shape.heads, shape.dim)
    counts = torch.full(size[:2], 300.0, device=world.device)
    return [world.normal(*size), world.normal(*size).abs() + 0.1, counts]


def carried_by(world: World, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block table of one request with as many pages in disorder, and as many windows of it."""
    options = {"generator": world.generator, "device": world.device}
    table = torch.randperm(pages, **options)[None].int()
    return table, world.column([0] * pages)


def means_of_windows(world: World) -> Case:
    """Mean queries of a prompt's windows, weighed by activation bias."""
    shape, windows = world.shape, world.query_windows()
    count = len(windows.num_tokens)
    found = Seen(*carried_by(world, count), world.column(range(count)), *states_of(world, count))
    distances = world.scratch(count, shape.heads, shape.window)
    weights = world.scratch(count, shape.kv_heads, shape.window)
    vectors = world.scratch(count, shape.kv_heads, shape.group, shape.dim)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, found, 256, 2.0, distances, weights, *out)

    return Case(
        "activation_means", activation_means, activation_means_reference, call, [vectors],
        size_of(windows.queries, found.means, found.variances, vectors), is_exact=False,
    )  # fmt: skip


def statistics_of_queries(world: World) -> Case:
    """The running mean and variance of a prompt's queries."""
    shape, windows = world.shape, world.query_windows()
    count = len(windows.num_tokens)
    before = *carried_by(world, count), world.column(range(-1, count - 1))
    here = world.column(range(count))
    carried = Carried(world.column([1] * count), here, here)
    moments = world.scratch(count, shape.heads, 2, shape.dim)
    states = states_of(world, count)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, Seen(*before, *out), carried, moments)

    return Case(
        "query_statistics", query_statistics, query_statistics_reference, call, states,
        size_of(windows.queries, *states), is_exact=False,
    )  # fmt: skip


def joined_probes(world: World) -> Case:
    """Mean queries beside those of single tokens; one window of three has the same of both."""
    shape = world.shape
    windows = max(min(shape.tokens, shape.chunk) // shape.window, 3)
    rows = shape.group * (LAST + ACTIVE)
    means = world.normal(windows, shape.kv_heads, shape.group, shape.dim)
    queries = world.normal(windows, shape.kv_heads, rows, shape.dim, dtype=shape.dtype)
    means[::3] = queries[::3, :, : shape.group].float()
    counts = world.column([shape.group if s % 3 == 0 else rows for s in range(windows)])
    parts = [
        ProbeVectors(means, world.column([shape.group] * windows)), ProbeVectors(queries, counts)
    ]  # fmt: skip
    joined = world.scratch(windows, shape.kv_heads, shape.group + rows, shape.dim)
    filled = world.scratch(3, windows, dtype=torch.int32)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(parts, *out)

    return Case(
        "join_probes", join_probes, join_probes_reference, call, [joined, filled],
        size_of(means, queries, joined),
    )  # fmt: skip


INDEX_CASES: tuple[Callable[[World], Case], ...] = (
    hash_keys, hash_probes, scores_of_hashes, scores_of_prompt_hashes, statistics_of_pages,
    bounds_of_filled_pages, scores_of_bounds, scores_of_means, probes_of_windows,
    mean_queries_of_windows, means_of_windows, statistics_of_queries, joined_probes,
)  # fmt: skip
"""Kernels that choose pages."""
