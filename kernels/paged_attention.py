"""Exact attention of query windows to the pages that each KV head selected for them.

For row ``s * Hk + h`` of the page table, all ``G`` query heads of KV head ``h`` and all tokens of
window ``s`` attend to the row's tokens, in the order of its pages, ``softmax(scale * q k) v``. The
row's last tokens are the window's own, causal among themselves.

A program takes BLOCK_M of a window's ``tokens * G`` queries of one KV head, so that the heads of a
group read each key once. A decoded token has few of them: there the row is cut into parts of equal
length, each a program, whose results are merged by their log-sum-exp (flash-decoding, Dao et al.
2023). Parts are cut by the row's width, not by how many rows there are: a request gets the same
answer alone and in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.merge_attention import LOG2E, log_of_sum, merge_attention, store_rounded
from kvplug.kernels.online_softmax import UNIT, attend_block
from kvplug.kernels.page_rows import PageRows

QUERIES = (torch.bfloat16, torch.float16)
"""What queries may be."""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
"""What keys and values may be besides the queries' dtype."""
EIGHT_BITS_FROM = (8, 9)
"""First compute capability of NVIDIA GPUs that has them."""
SPLIT = 512
"""Keys of a part, unless the caller chooses. Not measured: no GPU was at hand."""


class PagedCache(NamedTuple):
    """Keys and values of one layer, wherever their pages lie."""

    keys: torch.Tensor
    """``[pages, P, Hk, D]`` of the queries' dtype or float8 e4m3, contiguous in the last
    dimension. vLLM's cache ``[pages, Hk, P, 2 * D]`` is ``transpose(1, 2).split(D, -1)``; a pool
    of single heads' pages ``[slots, P, D]`` is ``[:, :, None].expand(-1, -1, Hk, -1)``."""
    values: torch.Tensor
    """``[pages, P, Hk, D]`` of the keys' dtype."""
    key_scale: torch.Tensor | None = None
    """Float32 of one number that keys are multiplied by. None: 1."""
    value_scale: torch.Tensor | None = None
    """The same for values."""


class Parts(NamedTuple):
    """Scratch for attention over ``n`` parts of each row."""

    out: torch.Tensor
    """``[n, T, H, D]`` float32."""
    lse: torch.Tensor
    """``[n, T, H]`` float32."""


class Blocks(NamedTuple):
    """Sizes of a program. None was measured: no GPU was at hand."""

    queries: int
    """BLOCK_M."""
    keys: int
    """BLOCK_N."""
    warps: int
    stages: int


def blocks_of(queries: int, dim: int) -> Blocks:
    """Sizes of a program for windows of up to so many queries of a KV head.

    Without spills on sm_90 and gfx942 (there one register, for windows over float8), and within the
    64 KiB of shared memory that an AMD GPU has.
    Three stages fetch page numbers ahead of the keys they lead to, which a decoded token waits for.

    Args:
        queries: G times the tokens of the longest window.
        dim: D.
    """
    if queries <= 32:
        return Blocks(max(16, triton.next_power_of_2(queries)), 32 if dim > 128 else 64, 4, 3)
    if dim > 128:
        return Blocks(64, 32, 8, 2)
    return Blocks(64, 64, 4, 2) if queries <= 64 else Blocks(128, 64, 8, 2)


# Parts of a step's columns and rows begin anywhere, and sizes follow the batch.
@triton.jit(do_not_specialize=["p_start", "p_count", "p_table", "p_lengths", "lse_part"])
def _paged_attention_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_table, p_lengths, p_keys, p_values, p_key_scale,
    p_value_scale, p_out, p_lse, query_token, query_head, key_page, key_token, key_head,
    value_page, value_token, value_head, out_part, out_token, out_head,
    width, lse_part, scale, num_parts, part_keys,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, CAP: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one window and KV head over one part of their row."""
    i_part, i_m = tl.program_id(0) % num_parts, tl.program_id(0) // num_parts
    i_h, i_s = tl.program_id(1), tl.program_id(2)
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    count = tl.load(p_count + i_s)
    if i_m * BLOCK_M >= count * G:
        return
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    o_t, o_h = o_m // G, i_h * G + o_m % G
    m_m = o_m < count * G
    m_md = m_m[:, None] & (o_d < D)[None, :]
    o_token = (tl.load(p_start + i_s) + o_t).to(tl.int64)
    o_q = o_token * (query_token * UNIT) + o_h * (query_head * UNIT)
    p_q = p_queries + o_q[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_md, other=0.0).to(DOT)  # [BM, BD]
    # A query sees the tokens before its window and the window's up to itself.
    before = tl.load(p_lengths + i_row) - count
    b_visible = before + o_t + 1  # [BM]
    first_sees = before + i_m * BLOCK_M // G + 1
    last_sees = before + tl.minimum((i_m * BLOCK_M + BLOCK_M - 1) // G + 1, count)
    begin = i_part * part_keys
    stop = tl.minimum(last_sees, begin + part_keys)
    all_see = tl.maximum(tl.minimum(first_sees, stop) - begin, 0) // BLOCK_N * BLOCK_N + begin
    if p_key_scale is not None:
        scale *= tl.load(p_key_scale)
    p_row = p_table + i_row * width
    p_keys += i_h.to(tl.int64) * (key_head * UNIT)
    p_values += i_h.to(tl.int64) * (value_head * UNIT)
    b_most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for j in range(begin, all_see, BLOCK_N):
        b_most, b_total, b_out = attend_block(
            b_q, b_most, b_total, b_out, p_keys, p_values, p_row, j, stop, b_visible, scale,
            key_page, key_token, value_page, value_token, PAGE, D, CAP, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    for j in range(all_see, stop, BLOCK_N):
        b_most, b_total, b_out = attend_block(
            b_q, b_most, b_total, b_out, p_keys, p_values, p_row, j, stop, b_visible, scale,
            key_page, key_token, value_page, value_token, PAGE, D, CAP, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    b_norm = 1 / tl.where(b_total == 0, 1, b_total)
    if p_value_scale is not None:
        b_norm *= tl.load(p_value_scale)
    if num_parts > 1:
        # An empty part's output is not read.
        m_md &= (o_m < tl.where(stop > begin, count * G, 0))[:, None]
    p_o = p_out + i_part.to(tl.int64) * (out_part * UNIT)
    o_out = o_token * (out_token * UNIT) + o_h * (out_head * UNIT)
    p_o += o_out[:, None] + o_d[None, :]
    store_rounded(p_o, b_out * b_norm[:, None], m_md)
    if p_lse is not None:
        p_l = p_lse + i_part.to(tl.int64) * lse_part
        p_l += o_token * (tl.num_programs(1) * G) + o_h
        b_base = tl.where(b_total == 0, 0.0, b_most / LOG2E)
        tl.store(p_l, log_of_sum(b_base, b_total), mask=m_m)


def parts_of(rows: PageRows, page: int, part: int = SPLIT) -> int:
    """How many parts of about so many tokens the rows have.

    Args:
        rows: To be attended to.
        page: P.
        part: Tokens of a part.
    """
    return max(-(-rows.table.shape[1] * page // part), 1)


def paged_attention(
    windows: QueryWindows, rows: PageRows, cache: PagedCache, scale: float, longest: int,
    out: torch.Tensor, lse: torch.Tensor | None = None, parts: Parts | None = None,
    cap: float = 0.0,
) -> None:  # fmt: skip
    """Attends to the pages of every row, and to all of them where a row has all.

    A query without any token to attend to gives 0, with a log-sum-exp of minus infinity. Tokens of
    no window are left alone without ``parts``, and get anything with them.

    Args:
        windows: The queries, bfloat16 or float16.
        rows: What each window and KV head attends to; no length is above W * P.
        cache: Keys and values.
        scale: Of the logits.
        longest: Most tokens of a window.
        out: ``[T, H, D]`` of the queries' dtype, written; tokens and heads may be strided.
        lse: ``[T, H]`` float32, written: natural logarithm of the sum of exponentials of the
            logits. None: not wanted.
        parts: Scratch for ``n`` parts of every row, to be merged, for windows of few tokens: see
            :func:`parts_of`. None: rows are not cut.
        cap: Logits become ``cap * tanh(logit / cap)``. 0: they stay.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or head or page size are
            not supported.
    """
    heads, dim = windows.check_queries()[1:]
    num, kv_heads, page = _check(windows, rows, cache, out, lse, parts)
    require(
        longest >= 1 and cap >= 0,
        f"longest must be 1 or more and cap 0 or more, not {longest} and {cap}.",
    )
    group, width = heads // kv_heads, rows.table.shape[1]
    if not num or not len(windows.queries):
        return
    blocks = blocks_of(longest * group, dim)
    num_parts = len(parts.out) if parts else 1
    part_keys = -(-width * page // (num_parts * blocks.keys)) * blocks.keys
    target, sums = parts if parts else (out[None], lse)
    scales = [one if one is None else one.view(1) for one in cache[2:]]
    strides = [  # of all but the last dimension
        stride // UNIT.value
        for tensor in (windows.queries, cache.keys, cache.values, target)
        for stride in _strides(tensor)
    ]
    _paged_attention_kernel[(num_parts * -(-longest * group // blocks.queries), kv_heads, num)](
        *windows, *rows, cache.keys, cache.values, *scales, target, sums, *strides,
        width, out.shape[0] * heads, scale, num_parts, part_keys,
        G=group, D=dim, PAGE=page, CAP=cap, DOT=dot_type(windows.queries.dtype),
        BLOCK_M=blocks.queries, BLOCK_N=blocks.keys, BLOCK_D=triton.next_power_of_2(dim),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if parts:
        merge_attention(*parts, out, lse)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last.

    Raises:
        ValueError: One is no multiple of :data:`UNIT`.
    """
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    used = tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
    require(
        all(stride % UNIT.value == 0 for stride in used),
        f"Queries, keys, values and outputs must have strides that are multiples of "
        f"{UNIT.value}, not {strides}.",
    )
    return used


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What matrices are multiplied in: the interpreter takes bfloat16 for whole numbers."""
    is_interpreted = not isinstance(_paged_attention_kernel, triton.JITFunction)
    if dtype == torch.bfloat16:
        return tl.float32 if is_interpreted else tl.bfloat16
    return tl.float16


def _check(
    windows: QueryWindows, rows: PageRows, cache: PagedCache, out: torch.Tensor,
    lse: torch.Tensor | None, parts: Parts | None,
) -> tuple[int, int, int]:  # fmt: skip
    """Refuses what the kernel would read wrongly; returns S, Hk and P."""
    queries = windows.queries
    tokens, heads, dim = queries.shape
    check("queries", queries, (tokens, heads, dim), QUERIES, contiguous=False)
    stored = (queries.dtype, *EIGHT_BITS)
    check("keys", cache.keys, ("pages", "P", "Hk", dim), stored, contiguous=False)
    check("values", cache.values, tuple(cache.keys.shape), cache.keys.dtype, contiguous=False)
    page, kv_heads = cache.keys.shape[1:3]
    check_page(page)
    if cache.keys.dtype in EIGHT_BITS and queries.is_cuda and torch.version.hip is None:
        have = torch.cuda.get_device_capability(queries.device)
        require(
            have >= EIGHT_BITS_FROM,
            f"Caches in float8 need compute capability {EIGHT_BITS_FROM} or more, not {have}.",
        )
    require(
        heads % kv_heads == 0,
        f"Query heads must be a multiple of KV heads, not {heads} of {kv_heads}.",
    )
    num = len(windows.num_tokens)
    check("table", rows.table, (num * kv_heads, "W"), torch.int32)
    check("lengths", rows.lengths, (num * kv_heads,), torch.int32)
    check("out", out, (tokens, heads, dim), queries.dtype, contiguous=False)
    if lse is not None:
        check("lse", lse, (tokens, heads), torch.float32)
    for name, one in (("key_scale", cache.key_scale), ("value_scale", cache.value_scale)):
        if one is not None:
            check(name, one.view(-1), (1,), torch.float32)
    if parts is not None:
        check("parts.out", parts.out, ("n", tokens, heads, dim), torch.float32)
        check("parts.lse", parts.lse, (len(parts.out), tokens, heads), torch.float32)
        require(len(parts.out) > 0, "parts must be one or more.")
    scratch = parts._asdict() if parts else {}
    check_devices(
        queries=queries, out=out, log_sums=lse, **rows._asdict(), **cache._asdict(),
        **{f"parts.{name}": one for name, one in scratch.items()},
    )  # fmt: skip
    return num, kv_heads, page


def paged_attention_reference(
    windows: QueryWindows, rows: PageRows, cache: PagedCache, scale: float, longest: int,
    out: torch.Tensor, lse: torch.Tensor | None = None, parts: Parts | None = None,
    cap: float = 0.0,
) -> None:  # fmt: skip
    """Twin of :func:`paged_attention` in plain torch; in float64 if ``out`` is."""
    exact = torch.float64 if out.dtype == torch.float64 else torch.float32
    page, kv_heads = cache.keys.shape[1:3]
    group = out.shape[1] // kv_heads
    factors = [1.0 if one is None else one.to(exact) for one in cache[2:]]
    for row, length in enumerate(rows.lengths.tolist()):
        s, head = divmod(row, kv_heads)
        mine = windows.of(s)[:, head * group : (head + 1) * group].to(exact)  # [c, G, D]
        pages = rows.table[row, : -(-length // page)].long()
        keys, values = (
            part[pages, :, head].to(exact).flatten(0, 1)[:length] * factor
            for part, factor in zip(cache[:2], factors, strict=True)
        )  # [L, D]
        logits = scale * torch.einsum("cgd,ld->cgl", mine, keys)
        logits = cap * (logits / cap).tanh() if cap else logits
        last = length - len(mine) + torch.arange(len(mine), device=out.device)
        unseen = torch.arange(length, device=out.device) > last[:, None]  # [c, L]
        logits = logits.masked_fill(unseen[:, None], -torch.inf)
        start = int(windows.token_start[s])
        where = slice(start, start + len(mine)), slice(head * group, (head + 1) * group)
        out[where] = (logits.softmax(-1).nan_to_num(0.0) @ values).to(out.dtype)
        if lse is not None:
            lse[where] = logits.logsumexp(-1).to(lse.dtype)


def _variant(  # one way of calling the kernel
    stored: str, queries: int, group: int, dim: int, page: int, cap: float = 0.0,
    is_scaled: bool = False, is_cut: bool = False,
) -> Variant:  # fmt: skip
    """A variant for bfloat16 queries, so many of each KV head and window."""
    blocks = blocks_of(queries, dim)
    scales = "*fp32 *fp32" if is_scaled else ""
    target = "*fp32 *fp32" if is_cut else "*bf16"
    absent = {} if is_scaled else {"p_key_scale": None, "p_value_scale": None}
    return Variant(
        _paged_attention_kernel,
        f"*bf16 *i32 *i32 *i32 *i32 *{stored} *{stored} {scales} {target} " + "i32 " * 13
        + "fp32 i32 i32",
        absent | ({} if is_cut else {"p_lse": None}) | {
            "G": group, "D": dim, "PAGE": page, "CAP": cap, "DOT": tl.bfloat16,
            "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys,
            "BLOCK_D": triton.next_power_of_2(dim),
        },
        blocks.warps, blocks.stages,
    )  # fmt: skip


COMPILED = (
    _variant("bf16", 4, 4, 128, 32, is_cut=True),
    _variant("bf16", 8, 8, 256, 16, is_cut=True),
    _variant("bf16", 3, 3, 80, 64, is_cut=True, cap=50.0),
    _variant("bf16", 1024, 4, 128, 32),
    _variant("bf16", 1024, 4, 256, 128),
)
"""For :mod:`kvplug.kernels.compile_check`."""
COMPILED_EIGHT_BITS = (
    _variant("fp8e4nv", 4, 4, 128, 32, is_scaled=True, is_cut=True),
    _variant("fp8e4nv", 1024, 4, 128, 16, is_scaled=True),
)
"""The same for caches in float8, which sm_80 has not."""
