"""What the gate and the timer call of attention mass; see :mod:`kvplug.bench.kernel_cases`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.collect_mass import collect_mass, collect_mass_reference
from kvplug.kernels.local_mass import LocalWindows, local_mass, local_mass_reference

EVERY = 32
"""Queries per one that counts; small shapes have windows of fewer."""


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


MASS_CASES: tuple[Callable[[World], Case], ...] = (mass_of_windows, collected_mass)
"""Kernels that learn which keys are attended to."""
