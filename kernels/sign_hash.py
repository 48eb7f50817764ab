"""Sign hashes: 64 sign bits of a vector on fixed planes (random hyperplanes, Charikar 2002).

``bit b of word = sum_d vector_d * plane_db > 0``, in float32, as
:func:`kvplug.index.planes.sign_words` has it. New keys are hashed where they are written, a word
for each slot of the paged cache; probes are hashed in place. A word depends on nothing but its
vector: every sum is taken in one order, whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim, check_page
from kvplug.kernels.compile_check import Variant

BITS = 64
FEW_ROWS = 512
"""Up to so many vectors a head, programs take 16 each, so that more of them run at once."""


@triton.jit(do_not_specialize=["rows"])
def _sign_hash_kernel(  # type: ignore[no-untyped-def]
    p_vectors, p_slots, p_planes, p_words, rows, stride_outer, stride_row, stride_head,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Words of BLOCK_T vectors of one head.

    Without slots, row ``t`` is vector ``t % PAGE`` of window ``t // PAGE``.
    """
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    if p_slots is not None:
        b_slot = tl.load(p_slots + o_t, mask=o_t < rows, other=-1)  # [BT]
        o_row = o_t.to(tl.int64) * stride_row
        m_t = b_slot >= 0
    else:
        b_slot = o_t.to(tl.int64)
        o_row = (b_slot // PAGE) * stride_outer + (b_slot % PAGE) * stride_row
        m_t = o_t < rows
    p_row = p_vectors + o_row + i_h.to(tl.int64) * stride_head  # [BT]
    o_b = tl.arange(0, 64)
    b_sums = tl.zeros([BLOCK_T, 64], dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_vectors = tl.load(p_row[:, None] + o_d[None, :], mask=m_t[:, None], other=0.0)  # [BT, BD]
        b_planes = tl.load(p_planes + (i_h * D + o_d)[:, None] * 64 + o_b[None, :])  # [BD, 64]
        b_sums = tl.dot(b_vectors.to(tl.float32), b_planes, b_sums, input_precision="ieee")
    b_bits = (b_sums > 0).to(tl.int64) << o_b.to(tl.int64)[None, :]  # [BT, 64]
    b_words = tl.sum(b_bits, 1)  # [BT]; the bits are apart, so their sum is their union
    o_word = (b_slot // PAGE * tl.num_programs(1) + i_h) * PAGE + b_slot % PAGE
    tl.store(p_words + o_word, b_words, mask=m_t)


def _launch(
    vectors: torch.Tensor, slots: torch.Tensor | None, planes: torch.Tensor, words: torch.Tensor,
    rows: int, strides: tuple[int, int, int], page: int,
) -> None:  # fmt: skip
    """Runs the kernel; strides are those of a window, of a row and of a head."""
    heads, dim, _ = planes.shape
    block = 16 if rows <= FEW_ROWS else 64
    if rows:
        _sign_hash_kernel[(triton.cdiv(rows, block), heads)](
            vectors, slots, planes, words, rows, *strides,
            PAGE=page, D=dim, BLOCK_T=block, BLOCK_D=_depth(dim), **_warps(block),
        )  # fmt: skip


def _depth(dim: int) -> int:
    """Dimensions of one matrix product: as many as divide the head size."""
    return 32 if dim % 32 == 0 else 16


def _warps(block: int) -> dict[str, int]:
    """Such that no registers are spilled: with 4 warps and 3 stages a block of 64 needs 255."""
    return {"num_warps": 8 if block == 64 else 4, "num_stages": 2}


def _check_planes(planes: torch.Tensor, heads: int, dim: int) -> None:
    """See :func:`sign_hash`."""
    check_head_dim(dim)
    check("planes", planes, (heads, dim, BITS), torch.float32)


def sign_hash(
    keys: torch.Tensor, slots: torch.Tensor, planes: torch.Tensor, words: torch.Tensor
) -> None:
    """Hashes new keys into the words of the slots that they are written to.

    Args:
        keys: ``[T, Hk, D]`` bfloat16, float16 or float32; tokens and heads may be strided.
        slots: ``[T]`` int64, ``page * P + offset``; a negative one is padding.
        planes: ``[Hk, D, 64]`` float32.
        words: ``[pages, Hk, P]`` int64, written at the slots.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    tokens, heads, dim = keys.shape
    check("keys", keys, ("T", "Hk", "D"), FLOATS, contiguous=False)
    check("slots", slots, (tokens,), torch.int64)
    _check_planes(planes, heads, dim)
    check("words", words, ("pages", heads, "P"), torch.int64)
    check_page(words.shape[2])
    check_devices(keys=keys, slots=slots, planes=planes, words=words)
    strides = (0, keys.stride(0), keys.stride(1))
    _launch(keys, slots, planes, words, tokens, strides, words.shape[2])


def sign_hash_probes(vectors: torch.Tensor, planes: torch.Tensor, words: torch.Tensor) -> None:
    """Hashes probe vectors; those from a window's count on give words without meaning.

    Args:
        vectors: ``[S, Hk, R, D]`` bfloat16, float16 or float32; the last dimension contiguous.
        planes: ``[Hk, D, 64]`` float32.
        words: ``[S, Hk, R]`` int64, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    windows, heads, probes, dim = vectors.shape
    check("vectors", vectors, ("S", "Hk", "R", "D"), FLOATS, contiguous=False)
    _check_planes(planes, heads, dim)
    check("words", words, (windows, heads, probes), torch.int64)
    check_devices(vectors=vectors, planes=planes, words=words)
    strides = (vectors.stride(0), vectors.stride(2), vectors.stride(1))
    _launch(vectors, None, planes, words, windows * probes, strides, probes)


def _words_of(vectors: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """``[..., Hk]`` int64 words of ``[..., Hk, D]``."""
    above = torch.einsum("...hd,hdb->...hb", vectors.float(), planes) > 0
    return (above.long() << torch.arange(BITS, device=planes.device)).sum(-1)


def sign_hash_reference(
    keys: torch.Tensor, slots: torch.Tensor, planes: torch.Tensor, words: torch.Tensor
) -> None:
    """Twin of :func:`sign_hash` in plain torch."""
    kept = slots >= 0
    page, offset = slots[kept] // words.shape[2], slots[kept] % words.shape[2]
    words[page, :, offset] = _words_of(keys, planes)[kept]


def sign_hash_probes_reference(
    vectors: torch.Tensor, planes: torch.Tensor, words: torch.Tensor
) -> None:
    """Twin of :func:`sign_hash_probes` in plain torch."""
    words.copy_(_words_of(vectors.transpose(1, 2), planes).transpose(1, 2))


COMPILED = (
    *(
        Variant(
            _sign_hash_kernel,
            f"*{dtype} *i64 *fp32 *i64 i32 i32 i32 i32",
            {"PAGE": 32, "D": dim, "BLOCK_T": block, "BLOCK_D": _depth(dim)},
            **_warps(block),
        )
        for dtype, dim, block in [("bf16", 128, 64), ("bf16", 80, 16), ("fp32", 256, 64)]
    ),
    Variant(
        _sign_hash_kernel,
        "*fp32 *fp32 *i64 i32 i32 i32 i32",
        {"p_slots": None, "PAGE": 24, "D": 128, "BLOCK_T": 16, "BLOCK_D": 32},
        **_warps(16),
    ),
)
"""For :mod:`kvplug.kernels.compile_check`."""
