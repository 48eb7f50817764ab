"""What the gate calls of budgets that vary: by how widely scores spread, and by their mass."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.density_means import (
    CarriedDensity,
    hand_on_densities,
    hand_on_densities_reference,
    learn_densities,
    learn_densities_reference,
)
from kvplug.kernels.layer_shares import Densities, layer_shares, layer_shares_reference
from kvplug.kernels.page_density import page_density, page_density_reference
from kvplug.kernels.top_p import top_p, top_p_reference

LAYERS = 32
"""That share a budget."""


def density_of_scores(world: World) -> Case:
    """Densities of a prompt's windows."""
    shape = world.shape
    windows, pages = max(min(shape.tokens, shape.chunk) // shape.window, 1), max(world.num_far(), 1)
    scores, far = world.normal(windows, shape.kv_heads, pages), world.far(windows)
    wanted = world.column([1] * windows)
    found = world.scratch(windows, shape.kv_heads)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(scores, far.begin, far.end, wanted, 0.5, *out)

    return Case(
        "page_density", page_density, page_density_reference, call, [found], size_of(scores),
        is_exact=False,
    )  # fmt: skip


def carried_density(world: World, means: torch.Tensor) -> CarriedDensity:
    """Windows of a prompt, each of which goes on from the one before, on a page each."""
    count = len(means)
    options = {"generator": world.generator, "device": world.device}
    table = torch.randperm(count, **options)[None].int()
    here = world.column(range(count))
    return CarriedDensity(
        table, world.column([0] * count), world.column(range(-1, count - 1)), here, here,
        world.column([1] * count), means,
    )  # fmt: skip


def means_of(world: World) -> torch.Tensor:
    """``[pages, L, 2]`` of as many pages as a prompt has windows in one step."""
    shape = world.shape
    pages = max(min(shape.tokens, shape.chunk) // shape.window, 2)
    means = world.normal(pages, LAYERS, 2).abs()
    means[..., 1] = 3
    return means


def densities_handed_on(world: World) -> Case:
    """One layer's column."""
    means = means_of(world)
    carried = carried_density(world, means)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(carried._replace(means=out[0]), 3)

    return Case(
        "hand_on_densities", hand_on_densities, hand_on_densities_reference, call, [means],
        2 * size_of(means) // LAYERS,
    )  # fmt: skip


def densities_learnt(world: World) -> Case:
    """What one layer found of every window."""
    means = means_of(world)
    carried = carried_density(world, means)
    found = world.normal(len(means), world.shape.kv_heads).abs()

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(carried._replace(means=out[0]), 3, carried.here, found)

    return Case(
        "learn_densities", learn_densities, learn_densities_reference, call, [means],
        2 * size_of(means) // LAYERS, is_exact=False,
    )  # fmt: skip


def shares_of_layers(world: World) -> Case:
    """Pages of decoded tokens in every layer."""
    shape = world.shape
    batch, heads = shape.batch, shape.kv_heads
    means = world.normal(world.num_pages, LAYERS, 2).abs()
    means[..., 1] = 3
    far = world.far(batch)
    columns = world.column(range(batch)), world.column([0] * batch)
    known = Densities(world.block_table, far.request, *columns, far.begin, far.end, means)
    counts = world.scratch(LAYERS, batch, heads, dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int64, device=world.device)
    budget = max(shape.budget // shape.page, 1)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(known, budget, max(min(32, budget // 2), 1), *out)

    moved = batch * LAYERS * 8 + size_of(counts)
    return Case("layer_shares", layer_shares, layer_shares_reference, call, [counts, total], moved)


def fewest_pages(world: World) -> Case:
    """Of decoded tokens, by the mass of their scores."""
    shape = world.shape
    batch, heads, pages = shape.batch, shape.kv_heads, max(world.num_far(), 1)
    scores, far = world.normal(batch, heads, pages), world.far(batch)
    masses = world.scratch(batch, heads, pages)
    counts = world.scratch(batch, heads, dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int64, device=world.device)
    budget = max(shape.budget // shape.page, 1)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(scores, far.begin, far.end, budget, 0.02, 0.5, masses, *out)

    return Case("top_p", top_p, top_p_reference, call, [counts, total], size_of(scores, masses))


DENSITY_CASES: tuple[Callable[[World], Case], ...] = (
    density_of_scores, densities_handed_on, densities_learnt, shares_of_layers, fewest_pages,
)  # fmt: skip
"""Kernels of budgets that vary."""
