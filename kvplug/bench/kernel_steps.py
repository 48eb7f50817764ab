"""The decode attention step strung from kernels: whether it is right, and what runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kvplug.bench.kernel_world import Shape, World
from kvplug.kernels.decode_regions import Regions
from kvplug.kernels.decode_step import DecodeStep, HashedLayer, StepShape, decode_step_reference
from kvplug.kernels.paged_attention import PagedCache
from kvplug.kernels.sign_hash import sign_hash

HASHED = 65536
"""Tokens whose keys are hashed at a time."""


class Inputs(NamedTuple):
    """Arguments of a step, in order, and its output."""

    queries: torch.Tensor
    keys: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    context_end: torch.Tensor
    layer: HashedLayer
    out: torch.Tensor


class Checked(NamedTuple):
    """A step's outputs, ``[B, H, D]``."""

    name: str
    """What was attended to."""
    found: torch.Tensor
    plain: torch.Tensor
    """By the twin, in the same dtype."""
    exact: torch.Tensor
    """In float64; by dense attention where everything is attended to."""


def regions_of(shape: Shape, budget_pages: int, dense_below: int) -> Regions:
    """Regions with the shape's sinks and local tokens."""
    return Regions(shape.page, -(-shape.sink // shape.page), shape.local, budget_pages, dense_below)


def inputs_of(world: World, lengths: list[int]) -> Inputs:
    """A step over a world's cache, whose keys are all hashed.

    Args:
        world: Keys, values and tables.
        lengths: Tokens of each context.
    """
    shape = world.shape
    planes = world.whole(shape.kv_heads, shape.dim, 64)
    words = world.scratch(world.num_pages, shape.kv_heads, shape.page, dtype=torch.int64)
    _hash_all(world, planes, words)
    ends = world.column(lengths)
    last = (ends - 1).clamp(min=0).long()
    pages = world.block_table.gather(1, last[:, None] // shape.page)[:, 0].long()
    slots = pages * shape.page + last % shape.page
    keys = world.keys[pages, last % shape.page]
    size = (shape.batch, shape.heads, shape.dim)
    # Quarters are exact in every dtype, and sums of their products with whole planes too.
    queries = world.whole(*size, dtype=shape.dtype) / 4
    layer = HashedLayer(planes, words, PagedCache(world.keys, world.values), shape.dim**-0.5)
    out = world.scratch(*size, dtype=shape.dtype)
    slots = slots.where(ends > 0, -1)
    return Inputs(queries, keys, slots, world.block_table, ends, layer, out)


def _hash_all(world: World, planes: torch.Tensor, words: torch.Tensor) -> None:
    """Hashes every key of the cache where it lies."""
    shape = world.shape
    slots = torch.arange(world.num_pages * shape.page, device=world.device)
    step = max(HASHED // shape.page, 1)
    for first in range(0, world.num_pages, step):
        keys = world.keys[first : first + step].reshape(-1, shape.kv_heads, shape.dim)
        begin = first * shape.page
        sign_hash(keys, slots[begin : begin + len(keys)], planes, words)


def step_of(shape: Shape, regions: Regions, device: torch.device) -> DecodeStep:
    """Buffers for steps of a shape."""
    largest = StepShape(shape.batch, shape.tokens, shape.heads, shape.kv_heads, shape.dim)
    return DecodeStep.allocate(largest, regions, device)


def dense_reference(inputs: Inputs) -> torch.Tensor:
    """``[B, H, D]`` attention to everything in float64, request by request."""
    cache, page = inputs.layer.cache, inputs.layer.words.shape[2]
    out = torch.zeros_like(inputs.queries, dtype=torch.float64)
    for row, length in enumerate(inputs.context_end.tolist()):
        if not length:
            continue
        pages = inputs.block_table[row, : -(-length // page)].long()
        keys, values = (
            side[pages].flatten(0, 1)[:length].double() for side in (cache.keys, cache.values)
        )  # [T, Hk, D]
        queries = inputs.queries[row].double().unflatten(0, (keys.shape[1], -1))  # [Hk, G, D]
        logits = torch.einsum("hgd,thd->hgt", queries, keys) * inputs.layer.scale
        out[row] = torch.einsum("hgt,thd->hgd", logits.softmax(-1), values).flatten(0, 1)
    return out


def check_step(shape: Shape, device: torch.device) -> Iterator[Checked]:
    """Runs the step on contexts of different lengths, an unused row among them.

    Yields:
        The step with regions under which pages are selected, or everything is attended to.
    """
    world = World(shape, device)
    lengths = [max(shape.tokens - 37 * row, 1) for row in range(shape.batch)]
    if len(lengths) > 1:
        lengths[1] = 0
    inputs = inputs_of(world, lengths)
    for name, budget, dense_below in (
        ("selected pages", shape.budget // shape.page, 0),
        ("a budget of everything", shape.pages, 0),
        ("short contexts", 1, shape.tokens),
    ):
        regions = regions_of(shape, budget, dense_below)
        step_of(shape, regions, device)(*inputs)
        plain = torch.empty_like(inputs.out)
        decode_step_reference(*inputs[:-1], regions, plain)
        if name == "selected pages":
            exact = torch.empty_like(inputs.out, dtype=torch.float64)
            decode_step_reference(*inputs[:-1], regions, exact)
        else:
            exact = dense_reference(inputs)
        yield Checked(name, inputs.out.clone(), plain, exact)
