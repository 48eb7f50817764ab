"""What probes ask of channel codes: signs, and weights of a few bits that are counted bit by bit.

The twin on CPU is :meth:`kvplug.index.channels.ChannelsIndex.score`. A code stands for deviations
``sign + extreme / 2`` with both bits as +-1, so its product with a probe is a weighted sum of
bits: of sign bits by ``|probe * deviation|`` in units of a seventh of the largest, of extreme bits
by half of that, both rounded to whole numbers of :data:`PLANES` bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kvplug.kernels.channel_choice import check_channels
from kvplug.kernels.channel_codes import FIELD
from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages

PLANES = 3
"""Bits of a weight."""
NEARLY_HALF = tl.constexpr(0.4995)
"""Rounds weights: half of the largest weight is 3.5, which must not be left to the last bit."""
MOST = tl.constexpr(2**PLANES - 1)
"""The largest weight."""
LOG2_E = 1 / math.log(2)


@triton.jit
def _channel_probes_kernel(  # type: ignore[no-untyped-def]
    p_vectors, p_counts, p_table, p_request, p_chosen, p_scales, p_asked, p_units,
    table_stride, factor, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One probe of one window and KV head."""
    i_r, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_r >= tl.load(p_counts + i_s):
        return
    heads, o_c = tl.num_programs(1), tl.arange(0, C)
    place = tl.load(p_table + tl.load(p_request + i_s).to(tl.int64) * table_stride).to(tl.int64)
    i_place = place * heads + i_h
    i_probe = ((i_s * heads + i_h).to(tl.int64)) * tl.num_programs(0) + i_r
    b_channel = tl.load(p_chosen + i_place * C + o_c).to(tl.int32)  # [C]
    b_deviation = tl.load(p_scales + i_place * (2 * C) + C + o_c)
    b_weight = tl.load(p_vectors + i_probe * D + b_channel).to(tl.float32) * b_deviation
    m_number = b_weight == b_weight
    most = tl.max(tl.where(m_number, tl.abs(b_weight), 0.0), 0)
    unknown = tl.sum((b_weight != b_weight).to(tl.int32), 0)
    most = tl.where(unknown > 0, float("nan"), most)
    unit = tl.div_rn(most, MOST * 1.0)
    tl.store(p_units + i_probe, factor * unit)
    inverse = tl.where(unit > 0, tl.div_rn(1.0, unit), 0.0)
    b_size = tl.abs(b_weight) * inverse
    b_whole = tl.where(b_size < MOST + 1, b_size + NEARLY_HALF, 0.0).to(tl.int32)
    b_half = tl.where(b_size < MOST + 1, b_size * 0.5 + NEARLY_HALF, 0.0).to(tl.int32)
    o_bit = o_c.to(tl.int64)
    sign = tl.sum((b_weight > 0).to(tl.int64) << o_bit, 0)
    if C == 64:
        p_low = p_asked + i_probe * 8
        tl.store(p_low, sign)
        tl.store(p_low + 4, sign)
        for i in tl.static_range(3):
            tl.store(p_low + 1 + i, tl.sum((b_whole >> i & 1).to(tl.int64) << o_bit, 0))
            tl.store(p_low + 5 + i, tl.sum((b_half >> i & 1).to(tl.int64) << o_bit, 0))
    else:
        p_low = p_asked + i_probe * 4
        tl.store(p_low, sign | (sign << C))
        for i in tl.static_range(3):
            low = tl.sum((b_whole >> i & 1).to(tl.int64) << o_bit, 0)
            high = tl.sum((b_half >> i & 1).to(tl.int64) << o_bit, 0)
            tl.store(p_low + 1 + i, low | (high << C))


def channel_probes(
    vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    chosen: torch.Tensor, scales: torch.Tensor, scale: float,
    asked: torch.Tensor, units: torch.Tensor,
) -> None:  # fmt: skip
    """Weighs the probes of every window by the channels of its context.

    A probe that is not finite asks for nothing and has a unit that is not finite.

    Args:
        vectors: ``[S, Hk, R, D]`` bfloat16, float16 or float32.
        counts: ``[S]`` int32 probes of each window, at most R; what is asked by others is left
            alone.
        far: Which context a window belongs to.
        chosen: ``[pages, Hk, C]`` int16; see :func:`kvplug.kernels.channel_choice.channel_choice`.
        scales: ``[pages, Hk, 2, C]`` float32.
        scale: Of the layer's logits.
        asked: ``[S, Hk, R, C / 32, 4]`` int64, written: for each word of a code the wanted bits,
            then the bits of their weights, lowest first.
        units: ``[S, Hk, R]`` float32, written: a weight of 1 as a logit, in units of ln 2.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("vectors", vectors, ("S", "Hk", "R", "D"), FLOATS)
    windows, heads, probes, dim = vectors.shape
    check_head_dim(dim)
    check("counts", counts, (windows,), torch.int32)
    check("block_table", far.block_table, ("B", "max_pages"), torch.int32, contiguous=False)
    check("request", far.request, (windows,), torch.int32)
    check_channels(chosen, scales, heads)
    channels = chosen.shape[2]
    check_asked(asked, units, (windows, heads, probes), channels)
    check_devices(
        vectors=vectors, counts=counts, block_table=far.block_table, request=far.request,
        chosen=chosen, scales=scales, asked=asked, units=units,
    )  # fmt: skip
    if not units.numel():
        return
    _channel_probes_kernel[(probes, heads, windows)](
        vectors, counts, far.block_table, far.request, chosen, scales, asked, units,
        far.block_table.stride(0), scale * LOG2_E, D=dim, C=channels,
    )  # fmt: skip


def check_asked(
    asked: torch.Tensor, units: torch.Tensor, shape: tuple[int, int, int], channels: int
) -> None:
    """Refuses what kernels would read or write wrongly; see :func:`channel_probes`.

    Raises:
        ValueError: A tensor is of another shape, dtype or layout.
    """
    check("asked", asked, (*shape, channels // FIELD, PLANES + 1), torch.int64)
    check("units", units, shape, torch.float32)


def channel_probes_reference(
    vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    chosen: torch.Tensor, scales: torch.Tensor, scale: float,
    asked: torch.Tensor, units: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`channel_probes` in plain torch."""
    channels = chosen.shape[2]
    bits = torch.arange(channels, device=asked.device)
    for s, count in enumerate(counts.tolist()):
        if not count:
            continue
        place = int(far.block_table[int(far.request[s]), 0])
        index = chosen[place].long()[:, None].expand(-1, count, -1)
        weight = vectors[s, :, :count].float().gather(2, index) * scales[place, :, None, 1]
        unit = weight.abs().amax(2) / MOST.value  # [Hk, R]; NaN if one weight is
        units[s, :, :count] = float(torch.tensor(scale * LOG2_E)) * unit
        inverse = torch.where(unit > 0, 1 / unit, 0.0)[..., None]
        size = weight.abs() * inverse
        halves = []
        for share in (1.0, 0.5):
            rounded = torch.where(size < MOST.value + 1, size * share + NEARLY_HALF.value, 0.0)
            whole = rounded.long()
            planes = [weight > 0, *((whole >> plane & 1).bool() for plane in range(PLANES))]
            halves.append(torch.stack([(p.long() << bits).sum(2) for p in planes], 2))
        words = halves if channels == 64 else [halves[0] | halves[1] << FIELD]
        asked[s, :, :count] = torch.stack(words, 2)


COMPILED = (
    Variant(
        _channel_probes_kernel, "*bf16 *i32 *i32 *i32 *i16 *fp32 *i64 *fp32 i32 fp32",
        {"D": 128, "C": 64}, num_warps=2,
    ),
    Variant(
        _channel_probes_kernel, "*fp32 *i32 *i32 *i32 *i16 *fp32 *i64 *fp32 i32 fp32",
        {"D": 80, "C": 32}, num_warps=2,
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
