"""Local attention mass that windows give: what each key gets from the queries just behind it.

The twin on CPU is :class:`kvplug.index.local_mass.LocalMass` (InfLLM, Xiao et al. 2024, arXiv
2402.04617): every ``every``-th query by its absolute position gives each key of its window's local
region its attention probability, in a softmax over that region alone; the query heads of a KV head
are added up. Logits that are NaN or beyond :data:`BIG` in powers of 2 give nothing.

One launch normalises the queries, one adds up what they give. What a window gives depends on
nothing but the window; :mod:`kvplug.kernels.collect_mass` adds windows up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.merge_attention import LN2, LOG2E
from kvplug.kernels.paged_attention import dot_type

BIG = tl.constexpr(1e30)
"""Logits beyond it, and NaN, get no mass."""
LEAST = tl.constexpr(-126.0)
"""Binary logarithm of the least part of a row's largest share that is not 0."""
BLOCK_M = 16
"""Query rows of a program. Like all that follow not measured: no GPU was at hand."""
BLOCK_N = 64
"""Keys that a program looks at in a step."""
SIZES = ("most_rows", "most_keys")
"""Of scratch. They follow the batch, which must not choose the code: a window gives the same bits
whatever it shares a step with."""


class LocalWindows(NamedTuple):
    """The ``W`` windows of a step that have a query that counts."""

    queries: QueryWindows
    block_table: torch.Tensor
    """``[B, max_pages]`` int32 physical pages; rows may be strided."""
    request: torch.Tensor
    """``[W]`` int32 row of the block table."""
    context_end: torch.Tensor
    """``[W]`` int32 tokens of context, the window's own included."""
    first_page: torch.Tensor
    """``[W]`` int32 first page of the local region."""

    def check(self, kv_heads: int) -> tuple[int, int, int]:
        """Refuses what kernels would read wrongly.

        Args:
            kv_heads: Hk.

        Returns:
            W, H and D.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        windows, heads, dim = self.queries.check_queries()
        require(
            heads % kv_heads == 0,
            f"Query heads must be a multiple of KV heads, not {heads} of {kv_heads}.",
        )
        check("block_table", self.block_table, ("B", "max_pages"), torch.int32, contiguous=False)
        for name in self._fields[2:]:
            check(name, getattr(self, name), (windows,), torch.int32)
        rest = {name: getattr(self, name) for name in self._fields[1:]}
        check_devices(queries=self.queries.queries, **rest)
        return windows, heads, dim

    def span(self, first: int, last: int) -> LocalWindows:
        """Windows ``first`` to ``last``, the latter not included."""
        query, part = self.queries, slice(first, last)
        return LocalWindows(
            QueryWindows(query.queries, query.token_start[part], query.num_tokens[part]),
            self.block_table,
            *(column[part] for column in self[2:]),
        )

    def place(self, window: int, page: int) -> tuple[int, int, torch.Tensor]:
        """First position, end and ``[n]`` int64 local pages of a window: for references."""
        end, first_page = int(self.context_end[window]), int(self.first_page[window])
        first = end - int(self.queries.num_tokens[window])
        row = self.block_table[int(self.request[window])]
        return first, end, row[first_page : -(-end // page)].long()


@triton.jit
def _span(  # type: ignore[no-untyped-def]
    p_count, p_end, p_page, i_w, every, most_rows, most_keys, G: tl.constexpr, PAGE: tl.constexpr
):
    """A window's first position, its first local one, its rows and its local keys."""
    end = tl.load(p_end + i_w)
    first = end - tl.load(p_count + i_w)
    start = tl.load(p_page + i_w) * PAGE
    rows = (end // every - first // every) * G
    return first, start, tl.minimum(rows, most_rows), tl.minimum(end - start, most_keys)


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    p_queries, token_start, first, rows, i_h, m, every, stride_token, stride_head,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``[BM, BD]`` queries that count, from row ``m`` on, and their positions ``[BM]``."""
    o_m, o_d = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    b_position = (first // every + 1 + o_m // G) * every - 1  # [BM]
    o_token = (token_start + b_position - first).to(tl.int64) * stride_token
    o_head = (i_h * G + o_m % G).to(tl.int64) * stride_head
    m_md = (o_m < rows)[:, None] & (o_d < D)[None, :]
    p_rows = p_queries + (o_token + o_head)[:, None] + o_d[None, :]
    return tl.load(p_rows, mask=m_md, other=0.0), b_position


@triton.jit
def _load_keys(  # type: ignore[no-untyped-def]
    p_keys, p_pages, i_h, n, keys, stride_page, stride_token, stride_head,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``[BN, BD]`` local keys from key ``n`` on."""
    o_n, o_d = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = o_n < keys
    b_page = tl.load(p_pages + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
    o_key = b_page * stride_page + (o_n % PAGE).to(tl.int64) * stride_token
    p_tile = p_keys + o_key[:, None] + i_h.to(tl.int64) * stride_head + o_d[None, :]
    return tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _logits(b_rows, b_position, b_keys, n, start, scale, DOT: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[BM, BN]`` logits in powers of 2; minus infinity where a key is not to get anything."""
    b_logits = tl.dot(b_rows.to(DOT), tl.trans(b_keys.to(DOT)), input_precision="ieee") * (
        scale * LOG2E
    )
    o_position = start + n + tl.arange(0, BLOCK_N)
    m_mn = (o_position[None, :] <= b_position[:, None]) & (tl.abs(b_logits) <= BIG)
    return tl.where(m_mn, b_logits, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def _normalise_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_keys, p_table, p_request, p_end, p_page, p_rows,
    query_token, query_head, table_stride, key_page, key_token, key_head, every, most_rows,
    most_keys, scale,
    G: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Largest logit, and one over the sum of shares, of BLOCK_M rows of one window and KV head."""
    i_h, i_w = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M
    first, start, rows, keys = _span(
        p_count, p_end, p_page, i_w, every, most_rows, most_keys, G, PAGE
    )
    if m >= rows:
        return
    b_rows, b_position = _load_rows(
        p_queries, tl.load(p_start + i_w), first, rows, i_h, m, every, query_token, query_head,
        G, D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    p_pages = p_table + tl.load(p_request + i_w).to(tl.int64) * table_stride
    p_pages += tl.load(p_page + i_w)
    b_most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n in range(0, keys, BLOCK_N):
        b_keys = _load_keys(
            p_keys, p_pages, i_h, n, keys, key_page, key_token, key_head, PAGE, D, BLOCK_N, BLOCK_D
        )
        b_logits = _logits(b_rows, b_position, b_keys, n, start, scale, DOT, BLOCK_N)
        b_more = tl.maximum(b_most, tl.max(b_logits, 1))
        b_base = tl.where(b_more == float("-inf"), 0.0, b_more)
        b_total = b_total * tl.exp2(b_most - b_base)
        b_total += tl.sum(tl.exp2(b_logits - b_base[:, None]), 1)
        b_most = b_more
    has_any = b_most > float("-inf")
    b_inverse = tl.where(has_any, tl.div_rn(1.0, tl.where(has_any, b_total, 1.0)), 0.0)
    o_m = m + tl.arange(0, BLOCK_M)
    i_row = (i_w * tl.num_programs(1) + i_h).to(tl.int64)
    p_out = p_rows + i_row * (2 * most_rows) + o_m
    tl.store(p_out, tl.where(has_any, b_most, 0.0), mask=o_m < rows)
    tl.store(p_out + most_rows, b_inverse, mask=o_m < rows)


@triton.jit(do_not_specialize=SIZES)
def _give_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_keys, p_table, p_request, p_end, p_page, p_rows, p_given,
    query_token, query_head, table_stride, key_page, key_token, key_head, every, most_rows,
    most_keys, scale,
    G: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What all rows of one window and KV head give to BLOCK_N keys."""
    i_h, i_w = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N
    first, start, rows, keys = _span(
        p_count, p_end, p_page, i_w, every, most_rows, most_keys, G, PAGE
    )
    i_row = (i_w * tl.num_programs(1) + i_h).to(tl.int64)
    o_n = n + tl.arange(0, BLOCK_N)
    b_given = tl.zeros([BLOCK_N], dtype=tl.float32)
    if n < keys:
        p_pages = p_table + tl.load(p_request + i_w).to(tl.int64) * table_stride
        p_pages += tl.load(p_page + i_w)
        b_keys = _load_keys(
            p_keys, p_pages, i_h, n, keys, key_page, key_token, key_head, PAGE, D, BLOCK_N, BLOCK_D
        )
        for m in range(0, rows, BLOCK_M):
            b_rows, b_position = _load_rows(
                p_queries, tl.load(p_start + i_w), first, rows, i_h, m, every, query_token,
                query_head, G, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_logits = _logits(b_rows, b_position, b_keys, n, start, scale, DOT, BLOCK_N)
            o_m = m + tl.arange(0, BLOCK_M)
            p_row = p_rows + i_row * (2 * most_rows) + o_m
            b_most = tl.load(p_row, mask=o_m < rows, other=0.0)
            b_inverse = tl.load(p_row + most_rows, mask=o_m < rows, other=0.0)
            b_powers = b_logits - b_most[:, None]
            b_powers = tl.where(b_powers >= LEAST, tl.exp2(b_powers), 0.0)
            b_given += tl.sum(b_powers * b_inverse[:, None], 0)
    tl.store(p_given + i_row * most_keys + o_n, b_given, mask=o_n < most_keys)


def local_mass(
    windows: LocalWindows, keys: torch.Tensor, every: int, scale: float, rows: torch.Tensor,
    given: torch.Tensor,
) -> None:  # fmt: skip
    """What the queries that count of every window give to each of its local keys.

    Args:
        windows: The windows.
        keys: ``[pages, P, Hk, D]`` of the queries' dtype, any strides but for the last dimension,
            which is contiguous.
        every: Queries at positions one below a multiple of it count.
        scale: Of the layer's logits.
        rows: ``[W, Hk, 2, R]`` float32 scratch, where no window has more than ``R / G`` of them.
        given: ``[W, Hk, K]`` float32, written; entry ``k`` is for the window's ``k``-th local key,
            0 behind the last. No window has more than K.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or no query counts.
    """
    check("given", given, ("W", "Hk", "K"), torch.float32)
    kv_heads, most_keys = given.shape[1:]
    num, heads, dim = windows.check(kv_heads)
    check("given", given, (num, kv_heads, "K"), torch.float32)
    check("rows", rows, (num, kv_heads, 2, "R"), torch.float32)
    check("keys", keys, ("pages", "P", kv_heads, dim), FLOATS, contiguous=False)
    query, page = windows.queries, keys.shape[1]
    check_page(page)
    require(
        keys.dtype == query.queries.dtype,
        f"Keys and queries must have one dtype, not {keys.dtype} and {query.queries.dtype}.",
    )
    require(every >= 1, f"local_mass needs every >= 1, not {every}.")
    check_devices(keys=keys, rows=rows, given=given, queries=query.queries)
    if not given.numel() or not rows.numel():
        return
    most_rows = rows.shape[3]
    inputs = (
        *query, keys, windows.block_table, windows.request, windows.context_end,
        windows.first_page, rows,
    )  # fmt: skip
    sizes = (
        *query.queries.stride()[:2], windows.block_table.stride(0), *keys.stride()[:3], every,
        most_rows, most_keys, scale,
    )  # fmt: skip
    blocks = {
        "G": heads // kv_heads, "PAGE": page, "D": dim, "DOT": _dot_type(keys.dtype),
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": triton.next_power_of_2(dim),
    }  # fmt: skip
    grid = kv_heads, num
    _normalise_kernel[(triton.cdiv(most_rows, BLOCK_M), *grid)](*inputs, *sizes, **blocks)
    _give_kernel[(triton.cdiv(most_keys, BLOCK_N), *grid)](*inputs, given, *sizes, **blocks)


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """What matrices are multiplied in: as they are, where the interpreter can do it."""
    return tl.float32 if dtype == torch.float32 else dot_type(dtype)


def local_mass_reference(
    windows: LocalWindows, keys: torch.Tensor, every: int, scale: float, rows: torch.Tensor | None,
    given: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`local_mass` in plain torch, without scratch; float64 is computed in it."""
    given.zero_()
    kv_heads, page = given.shape[1], keys.shape[1]
    for w in range(len(windows.request)):
        first, end, pages = windows.place(w, page)
        queries = windows.queries.of(w).to(given.dtype)  # [c, H, D]
        positions = list(range(first // every * every + every - 1, end, every))
        at = torch.tensor(positions, dtype=torch.int64, device=given.device)
        queries = queries[at - first].unflatten(1, (kv_heads, -1))  # [n, Hk, G, D]
        mine = keys[pages].flatten(0, 1).to(given.dtype)  # [K, Hk, D]
        logits = torch.einsum("nhgd,khd->nhgk", queries, mine) * (scale * LOG2E.value)
        start = int(windows.first_page[w]) * page
        places = start + torch.arange(len(mine), device=given.device)
        allowed = (places <= at[:, None])[:, None, None] & (logits.abs() <= BIG.value)
        shares = (logits.where(allowed, -torch.inf) * LN2.value).softmax(-1)
        found = shares.where(allowed, 0.0).sum((0, 2))  # [Hk, K]
        given[w, :, : found.shape[1]] = found


_PLACES = "*i32 *i32 *i32 *i32"
_SIZES = "i32 i32 i32 i32 i32 i32 i32 i32 i32 fp32"


TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _compiled(dtype: str, group: int, page: int, dim: int) -> tuple[Variant, ...]:
    """One way to launch the first two."""
    blocks = {
        "G": group, "PAGE": page, "D": dim, "DOT": getattr(tl, TYPES[dtype]),
        "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": triton.next_power_of_2(dim),
    }  # fmt: skip
    before = f"*{dtype} *i32 *i32 *{dtype} {_PLACES} *fp32"
    return (
        Variant(_normalise_kernel, f"{before} {_SIZES}", blocks),
        Variant(_give_kernel, f"{before} *fp32 {_SIZES}", blocks),
    )


COMPILED = (
    *_compiled("bf16", 4, 32, 128),
    *_compiled("fp16", 3, 64, 80),
    *_compiled("bf16", 8, 128, 256),
)
"""For :mod:`kvplug.kernels.compile_check`."""
