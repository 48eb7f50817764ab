"""Cases of the kernels that select pages, attend to them and move them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.decode_regions import Regions, decode_regions, decode_regions_reference
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.gather_pages import Rotation, gather_pages, gather_pages_reference
from kvplug.kernels.merge_attention import merge_attention, merge_attention_reference
from kvplug.kernels.page_rows import Contexts, PageRows, page_rows, page_rows_reference
from kvplug.kernels.paged_attention import (
    PagedCache,
    Parts,
    paged_attention,
    paged_attention_reference,
    parts_of,
)
from kvplug.kernels.top_pages import candidates_shape, top_pages, top_pages_reference

PARTS = 8
"""Parts that are merged."""
GATHERED = 512
"""Most pages of the cold store that pages are gathered from."""


def regions_of_contexts(world: World) -> Case:
    """Far pages of contexts of many lengths."""
    shape = world.shape
    lengths = world.column(range(0, shape.tokens, max(shape.tokens // 1000, 1)))
    regions = Regions(shape.page, 2, shape.local, shape.budget // shape.page, shape.tokens // 3)
    columns = [torch.zeros_like(lengths) for _ in range(3)]

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(lengths, regions, shape.group, *out)

    return Case(
        "decode_regions", decode_regions, decode_regions_reference, call, columns,
        size_of(lengths, *columns),
    )  # fmt: skip


def contexts_of(world: World) -> Contexts:
    """Contexts of decoded tokens, of full length."""
    shape = world.shape
    ends = world.column([shape.tokens] * shape.batch)
    return Contexts(world.far(shape.batch), ends, shape.page)


def rows_of(world: World) -> PageRows:
    """Rows that hold sinks, budget and local pages of every request and KV head."""
    shape = world.shape
    unselected = world.num_far() - min(world.num_far(), shape.budget // shape.page)
    count = shape.batch * shape.kv_heads
    return PageRows(
        world.scratch(count, shape.pages - unselected, dtype=torch.int32),
        world.scratch(count, dtype=torch.int32),
    )


def best_pages(world: World) -> Case:
    """The best far pages of decoded tokens, of scores with ties, as rows of the page table."""
    shape, contexts = world.shape, contexts_of(world)
    pages, wanted = max(world.num_far(), 1), shape.budget // shape.page
    scores = world.whole(shape.batch, shape.kv_heads, pages) + 32
    size = candidates_shape(shape.batch, shape.kv_heads, pages, wanted)
    candidates = world.scratch(*size, dtype=torch.int32) if size else None

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(scores, wanted, contexts, PageRows(*out), candidates)

    rows = rows_of(world)
    return Case(
        "top_pages", top_pages, top_pages_reference, call, list(rows), size_of(scores, *rows)
    )


def pages_as_rows(world: World) -> Case:
    """Selections that were made elsewhere, as rows of the page table."""
    shape, contexts = world.shape, contexts_of(world)
    wanted = min(shape.budget // shape.page, world.num_far())
    first = int(contexts.far.begin[0])
    selected = world.column(range(first, first + wanted)).expand(shape.batch, shape.kv_heads, -1)
    selected = selected.contiguous()
    counts = world.column([wanted] * (shape.batch * shape.kv_heads))
    counts = counts.view(shape.batch, shape.kv_heads)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(selected, counts, contexts, PageRows(*out))

    rows = rows_of(world)
    return Case(
        "page_rows", page_rows, page_rows_reference, call, list(rows), size_of(selected, *rows)
    )


def merged_parts(world: World) -> Case:
    """Partial attention, merged by its log-sum-exp."""
    shape = world.shape
    parts = world.normal(PARTS, shape.batch, shape.heads, shape.dim)
    part_lse = world.normal(PARTS, shape.batch, shape.heads)
    part_lse[2] = -torch.inf
    outputs = [
        world.scratch(shape.batch, shape.heads, shape.dim, dtype=shape.dtype),
        world.scratch(shape.batch, shape.heads),
    ]

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(parts, part_lse, *out)

    return Case(
        "merge_attention", merge_attention, merge_attention_reference, call, outputs,
        size_of(parts, part_lse, *outputs), is_exact=False,
    )  # fmt: skip


def decoded(world: World) -> QueryWindows:
    """One query of each request."""
    shape = world.shape
    queries = world.normal(shape.batch, shape.heads, shape.dim, dtype=shape.dtype)
    return QueryWindows(queries, world.column(range(shape.batch)), world.column([1] * shape.batch))


def attention(world: World, *, of_prompt: bool = False) -> Case:
    """Attention of windows to sinks, budget and local pages, anywhere in the cache."""
    shape = world.shape
    windows, most = (world.query_windows(), shape.window) if of_prompt else (decoded(world), 1)
    count = len(windows.num_tokens)
    width = -(-(shape.sink + shape.budget + shape.local + most) // shape.page) + 1
    width = min(width, world.num_pages)
    tokens = width * shape.page
    picked = world.words(count * shape.kv_heads, world.num_pages).argsort(1)[:, :width]
    lengths = [tokens - 3 * row % (tokens - most) for row in range(count * shape.kv_heads)]
    rows = PageRows(picked.int().contiguous(), world.column(lengths))
    cache = PagedCache(world.keys, world.values)
    size = (parts_of(rows, shape.page), count, shape.heads)
    parts = None if of_prompt else Parts(world.scratch(*size, shape.dim), world.scratch(*size))
    out = world.scratch(*windows.queries.shape, dtype=shape.dtype)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(windows, rows, cache, shape.dim**-0.5, most, *out, parts=parts)

    moved = sum(lengths) * 2 * shape.dim * shape.dtype.itemsize + size_of(windows.queries, out)
    name = "paged_attention, prompt" if of_prompt else "paged_attention, decode"
    return Case(
        name, paged_attention, paged_attention_reference, call, [out], moved, is_exact=False
    )


def attention_of_prompt(world: World) -> Case:
    """See :func:`attention`."""
    return attention(world, of_prompt=True)


def gathered(world: World, *, is_turned: bool = False) -> Case:
    """Single heads' pages copied out of the host's memory, their keys turned or not."""
    shape, heads = world.shape, world.shape.kv_heads
    pages = min(world.num_pages, GATHERED)
    on_gpu = world.device.type == "cuda"
    size = (pages, 2, shape.page, heads, shape.dim)
    source = torch.empty(size, dtype=shape.dtype, pin_memory=on_gpu)
    source.copy_(world.normal(*size, dtype=shape.dtype))
    order = torch.randperm(pages * heads, generator=world.generator, device=world.device)
    order = order[: pages * heads // 2 + 1]
    slot = torch.arange(len(order), device=world.device).flip(0)
    entries = torch.stack([order // heads, order % heads, slot], 1).int()
    valid = world.column([max(len(order) - 1, 1)])
    slots = world.scratch(len(order), 2, shape.page, shape.dim, dtype=shape.dtype)
    angles = world.normal(len(order), shape.dim // 2)
    rotation = Rotation(angles.cos(), angles.sin(), True) if is_turned else None

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(source, entries, valid, *out, rotation)

    name = "gather_pages, turned" if is_turned else "gather_pages"
    moved = 2 * size_of(slots)
    return Case(
        name, gather_pages, gather_pages_reference, call, [slots], moved, is_exact=not is_turned
    )


def gathered_and_turned(world: World) -> Case:
    """See :func:`gathered`."""
    return gathered(world, is_turned=True)


ATTENTION_CASES: tuple[Callable[[World], Case], ...] = (
    regions_of_contexts, best_pages, pages_as_rows, attention, attention_of_prompt, merged_parts,
    gathered, gathered_and_turned,
)  # fmt: skip
"""Kernels that select pages, attend to them and move them."""
