"""What the gate and the timer call of attention mass; see :mod:`kvplug.bench.kernel_cases`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.collect_mass import collect_mass, collect_mass_reference
from kvplug.kernels.local_mass import LocalWindows, local_mass, local_mass_reference
from kvplug.kernels.representative_scores import (
    Ranking,
    representative_scores,
    representative_scores_reference,
)
from kvplug.kernels.settled_pages import settle_pages, settle_pages_reference

EVERY = 32
"""Queries per one that counts; small shapes have windows of fewer."""
TOP = 4
"""Keys that stand for a page, as the recipe `infllm` has them."""


def local_windows(world: World) -> LocalWindows:
    """The windows of the newest chunk of the first request's prompt, with their local regions."""
    shape, queries = world.shape, world.query_windows()
    total = int(queries.num_tokens.sum())
    # Its tokens are the last of the context that begin at a multiple of the window.
    first = (shape.tokens - total) // shape.window * shape.window
    ends = [
        first + int(start) + int(count)
        for start, count in zip(
            queries.token_start.tolist(), queries.num_tokens.tolist(), strict=True
        )
    ]  # fmt: skip
    sinks = -(-shape.sink // shape.page)
    starts = [first + start for start in queries.token_start.tolist()]
    pages = [max(max(start + 1 - shape.local, 0) // shape.page, sinks) for start in starts]
    requests = world.column([0] * len(ends))
    return LocalWindows(
        queries, world.block_table, requests, world.column(ends), world.column(pages)
    )


def most_keys(world: World, windows: LocalWindows) -> int:
    """K: local keys of the window that has most, in whole pages."""
    page = world.shape.page
    return int((-(-windows.context_end // page) - windows.first_page).max()) * page


def mass_of_windows(world: World) -> Case:
    """What the windows of a prompt's newest chunk give to their local keys."""
    shape, windows = world.shape, local_windows(world)
    count, every = len(windows.request), min(EVERY, shape.window)
    rows = world.scratch(count, shape.kv_heads, 2, shape.window // every * shape.group)
    given = world.scratch(count, shape.kv_heads, most_keys(world, windows))

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, world.keys, every, shape.dim**-0.5, rows, *out)

    local = (-(-windows.context_end // shape.page) - windows.first_page).sum()
    moved = int(local) * shape.page * shape.kv_heads * shape.dim * world.keys.element_size()
    return Case(
        "local_mass", local_mass, local_mass_reference, call, [given], moved + size_of(given),
        is_exact=False,
    )  # fmt: skip


def collected_mass(world: World) -> Case:
    """The same, added to the slots."""
    shape, windows = world.shape, local_windows(world)
    given = world.normal(len(windows.request), shape.kv_heads, most_keys(world, windows)).abs()
    mass = world.normal(world.num_pages, shape.kv_heads, shape.page).abs()
    seen = torch.zeros(world.num_pages, shape.kv_heads, dtype=torch.int32, device=world.device)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, given, *out)

    return Case(
        "collect_mass", collect_mass, collect_mass_reference, call, [mass, seen],
        3 * size_of(given),
    )  # fmt: skip


def settled_pages(world: World) -> Case:
    """Representatives and largest mass of all far pages of decoded tokens' contexts."""
    shape, far, pages = world.shape, world.far(world.shape.batch), world.num_far()
    mass = world.whole(world.num_pages, shape.kv_heads, shape.page).abs()
    size = world.num_pages, shape.kv_heads
    seen = torch.zeros(size, dtype=torch.int32, device=world.device)
    vectors = world.scratch(*size, shape.dim, dtype=torch.bfloat16)
    largest = world.scratch(*size)

    def call(function: Callable[..., None], out: Outputs) -> None:
        settled, found, most = out
        function(world.keys, far, pages, mass, settled, found, TOP, most)

    each = shape.page * 4 + TOP * shape.dim * world.keys.element_size() + shape.dim * 2
    return Case(
        "settle_pages", settle_pages, settle_pages_reference, call, [seen, vectors, largest],
        shape.batch * pages * shape.kv_heads * each,
    )  # fmt: skip


def scores_of_representatives(world: World) -> Case:
    """Scores of far pages by their representatives, by heads that agree, for decoded tokens."""
    shape, pages = world.shape, max(world.num_far(), 1)
    keys = world.normal(world.num_pages, shape.kv_heads, shape.dim, dtype=torch.bfloat16)
    vectors = world.normal(shape.batch, shape.kv_heads, shape.group, shape.dim, dtype=shape.dtype)
    counts, far = world.column([shape.group] * shape.batch), world.far(shape.batch)
    scores = world.scratch(shape.batch, shape.kv_heads, pages)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, vectors, counts, far, shape.dim**-0.5, Ranking(agree=True), *out)

    moved = shape.batch * world.num_far() * shape.kv_heads * shape.dim * 2
    return Case(
        "representative_scores", representative_scores, representative_scores_reference, call,
        [scores], moved + size_of(vectors, scores), is_exact=False,
    )  # fmt: skip


MASS_CASES: tuple[Callable[[World], Case], ...] = (
    mass_of_windows, collected_mass, settled_pages, scores_of_representatives,
)  # fmt: skip
"""Kernels that learn which keys are attended to, and choose pages by it."""
