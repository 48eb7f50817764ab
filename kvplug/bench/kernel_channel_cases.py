"""What the gate and the timer call of channel codes; :mod:`kvplug.bench.kernel_cases` says more."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvplug.bench.kernel_cases import ACTIVE, LAST
from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.channel_choice import channel_choice, channel_choice_reference
from kvplug.kernels.channel_codes import channel_codes, channel_codes_reference
from kvplug.kernels.channel_probes import PLANES, channel_probes, channel_probes_reference
from kvplug.kernels.channel_scores import ChannelScratch, channel_scores, channel_scores_reference

CHANNELS, WORDS = 64, 2
"""Of a code of 128 bits, as the recipe `channels` has it."""


def channels_of(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of every page in disorder, with means of 0 and deviations of 1."""
    shape = world.shape
    order = world.normal(world.num_pages, shape.kv_heads, shape.dim).argsort(-1)
    scales = torch.zeros(world.num_pages, shape.kv_heads, 2, CHANNELS, device=world.device)
    scales[:, :, 1] = 1
    return order[..., :CHANNELS].to(torch.int16), scales


def choice_of_channels(world: World) -> Case:
    """Channels of every request, by the first window of each."""
    shape = world.shape
    count = max(min(shape.window, shape.local) // shape.page, 1) * shape.page
    size = shape.batch, count // 2, shape.kv_heads, shape.dim
    half = world.whole(*size)
    # Mirrored at 0, and as many as a power of two: no sum and no mean rounds.
    keys = torch.cat([half, -half], 1).to(shape.dtype)
    places = world.block_table[:, 0].contiguous()
    chosen = world.scratch(world.num_pages, shape.kv_heads, CHANNELS, dtype=torch.int16)
    scales = world.scratch(world.num_pages, shape.kv_heads, 2, CHANNELS)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, places, *out)

    written = shape.batch * shape.kv_heads * CHANNELS * 10
    moved = size_of(keys, places) + written
    return Case(
        "channel_choice", channel_choice, channel_choice_reference, call, [chosen, scales], moved
    )


def codes_of_keys(world: World) -> Case:
    """Channel codes of a prompt's new keys."""
    shape = world.shape
    tokens = min(shape.tokens, shape.chunk, (world.num_pages - 1) * shape.page)
    keys = world.normal(tokens, shape.kv_heads, shape.dim, dtype=shape.dtype)
    slots = torch.arange(tokens, device=world.device)
    slots[::97] = -1
    firsts = world.column([0] * tokens)
    codes = world.words(world.num_pages, shape.kv_heads, WORDS, shape.page)
    channels = channels_of(world)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, slots, firsts, *channels, *out)

    moved = size_of(keys, slots, firsts) + tokens * shape.kv_heads * WORDS * 8
    return Case("channel_codes", channel_codes, channel_codes_reference, call, [codes], moved)


def weights_of_probes(world: World) -> Case:
    """What the queries of decoded tokens ask of codes."""
    shape = world.shape
    size = shape.batch, shape.kv_heads, shape.group
    # The largest number is 7 wherever it lies: a weight's unit is then 1, and no weight rounds.
    vectors = world.whole(*size, shape.dim, dtype=shape.dtype).clamp(-7, 7)
    counts, far = world.column([shape.group] * shape.batch), world.far(shape.batch)
    asked = world.words(*size, WORDS, PLANES + 1)
    units = world.scratch(*size)
    channels = channels_of(world)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(vectors, counts, far, *channels, shape.dim**-0.5, *out)

    moved = size_of(vectors, asked, units)
    return Case(
        "channel_probes", channel_probes, channel_probes_reference, call, [asked, units], moved
    )


def scores_of_codes(world: World, *, of_prompt: bool = False) -> Case:
    """Scores of far pages by channel codes, for decoded tokens or for windows of a prompt."""
    shape = world.shape
    windows = max(min(shape.tokens, shape.chunk) // shape.window, 1) if of_prompt else shape.batch
    probes = shape.group * (LAST + ACTIVE if of_prompt else 1)
    pages, heads = max(world.num_far(), 1), shape.kv_heads
    codes = world.words(world.num_pages, heads, WORDS, shape.page)
    asked = world.words(windows, heads, probes, WORDS, PLANES + 1)
    units = world.normal(windows, heads, probes).abs() / 64
    counts, far = world.column([probes] * windows), world.far(windows)
    between = ChannelScratch(
        world.scratch(windows, heads, probes, pages), world.scratch(windows, heads, probes)
    )
    scores = world.scratch(windows, heads, pages)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(codes, asked, units, counts, far, between, *out)

    moved = windows * heads * world.num_far() * shape.page * WORDS * 8 + size_of(asked, scores)
    name = "channel_scores, prompt" if of_prompt else "channel_scores, decode"
    return Case(
        name, channel_scores, channel_scores_reference, call, [scores], moved, is_exact=False
    )


def scores_of_prompt_codes(world: World) -> Case:
    """See :func:`scores_of_codes`."""
    return scores_of_codes(world, of_prompt=True)


CHANNEL_CASES: tuple[Callable[[World], Case], ...] = (
    choice_of_channels, codes_of_keys, weights_of_probes, scores_of_codes, scores_of_prompt_codes,
)  # fmt: skip
"""Kernels of channel codes."""
