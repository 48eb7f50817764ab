"""Paged attention: as accurate as plain torch, blind to what no row has, alike alone or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.paged_attention import (
    PagedCache,
    Parts,
    blocks_of,
    paged_attention,
    paged_attention_reference,
    parts_of,
)
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.caches import Attended, Shape, attended

ROOT = Path(__file__).resolve().parents[2]
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        Shape(16, 2, 1, 64, torch.bfloat16),
        Shape(32, 1, 3, 80, torch.float16),
        Shape(32, 2, 4, 128, torch.bfloat16),
        Shape(64, 1, 8, 96, torch.bfloat16),
        Shape(128, 1, 4, 256, torch.float16),
    ],
    ids=["p16-g1-d64", "p32-g3-d80-fp16", "p32-g4-d128", "p64-g8-d96", "p128-g4-d256-fp16"],
)
SMALL = Shape(16, 2, 3, 64, torch.float16)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place of 1."""
LEFT_ALONE = -3.0


class Result(NamedTuple):
    """``[T, H, D]`` and ``[T, H]``."""

    out: torch.Tensor
    lse: torch.Tensor


def results(case: Attended, dtype: torch.dtype, lse: torch.dtype) -> Result:
    """To be written; filled with what is left alone."""
    queries = case.windows.queries
    return Result(
        torch.full(queries.shape, LEFT_ALONE, dtype=dtype, device=queries.device),
        torch.full(queries.shape[:2], LEFT_ALONE, dtype=lse, device=queries.device),
    )


def scratch(case: Attended, num: int) -> Parts:
    """For rows in ``num`` parts."""
    tokens, heads, dim = case.windows.queries.shape
    device = case.windows.queries.device
    return Parts(
        torch.empty(num, tokens, heads, dim, device=device),
        torch.empty(num, tokens, heads, device=device),
    )


def attend(case: Attended, num_parts: int = 0, cap: float = 0.0) -> Result:
    """By the kernel."""
    dim = case.windows.queries.shape[2]
    found = results(case, case.windows.queries.dtype, torch.float32)
    longest = max(int(case.windows.num_tokens.max()), 1)
    parts = scratch(case, num_parts) if num_parts else None
    paged_attention(*case, dim**-0.5, longest, *found, parts, cap)
    return found


def assert_attended(case: Attended, found: Result, cap: float = 0.0) -> None:
    """As accurate as plain torch in float32, rounded."""
    dim, dtype = case.windows.queries.shape[2], case.windows.queries.dtype
    plain, exact = results(case, dtype, torch.float32), results(case, torch.float64, torch.float64)
    paged_attention_reference(*case, dim**-0.5, 1, *plain, None, cap)
    paged_attention_reference(*case, dim**-0.5, 1, *exact, None, cap)
    # Probabilities are rounded before they are multiplied with values, as in any fused kernel.
    values = case.cache.values.float()
    largest = values[values.isfinite()].abs().max().item()
    if case.cache.value_scale is not None:
        largest *= case.cache.value_scale.item()
    assert_accurate(found.out, plain.out, exact.out, ROUNDING[dtype] * largest)
    # Matrix units cut sums off where plain torch rounds them.
    known = exact.lse[exact.lse.isfinite()].abs().max().item()
    assert_accurate(found.lse, plain.lse, exact.lse, 64 * EPS * max(known, 1))


@SHAPES
def test_decoded_tokens(shape: Shape, device: str) -> None:
    """Windows of one token, alone and in parts, some of which have nothing to attend to."""
    case = attended(shape, [(1, 300), (1, 1), (1, 0), (1, 131)], device)
    whole = attend(case)
    assert_attended(case, whole)
    assert_attended(case, attend(case, parts_of(case.rows, shape.page, 128)))
    assert (whole.out[2] == 0).all()
    assert (whole.lse[2] == -torch.inf).all()


@SHAPES
def test_windows(shape: Shape, device: str) -> None:
    """Windows of several tokens, which are causal: long, unused, with nothing before them."""
    case = attended(shape, [(33, 190), (0, 0), (7, 7), (1, 50)], device)
    assert_attended(case, attend(case))


def test_a_window_of_several_programs(device: str) -> None:
    """The second one's first query does not see the last of the keys before a multiple of 64."""
    case = attended(SMALL, [(60, 144)], device)
    blocks = blocks_of(180, 64)
    before, first = 144 - 60, blocks.queries // SMALL.group
    assert (before + first + 1) // blocks.keys < 144 // blocks.keys
    assert_attended(case, attend(case))


def test_drafted_tokens_in_parts(device: str) -> None:
    """Some tokens see nothing in the last part, others do."""
    case = attended(SMALL, [(5, 130), (5, 66)], device)
    assert blocks_of(15, 64).keys == 64
    assert_attended(case, attend(case, 3))


def test_many_parts_of_short_rows(device: str) -> None:
    case = attended(SMALL, [(1, 3), (1, 65)], device)
    assert_attended(case, attend(case, 9))


@pytest.mark.parametrize("num_parts", [0, 2])
def test_float8(num_parts: int, device: str) -> None:
    """Keys and values of 8 bits with a scale for each tensor."""
    shape = Shape(32, 2, 4, 128, torch.bfloat16)
    case = attended(shape, [(1, 90), (4, 40)], device)
    scales = [torch.tensor(scale, device=device) for scale in (0.5, 3.0)]
    stored = [tensor.nan_to_num(0.0).to(torch.float8_e4m3fn) for tensor in case.cache[:2]]
    case = case._replace(cache=PagedCache(*stored, *scales))
    assert_attended(case, attend(case, num_parts))


def test_float8_compiles() -> None:
    """Where there is such a type, in a process in which kernels are not interpreted."""
    program = (
        "from kvplug.kernels.compile_check import compile_for as compiled\n"
        "from kvplug.kernels.paged_attention import COMPILED_EIGHT_BITS as variants\n"
        "for target in ('sm_90', 'gfx942'):\n"
        "    print(*(usage for variant in variants for usage in compiled(variant, target)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.check_output(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, text=True
    )
    most = {"sm_90": 227 * 1024, "gfx942": 64 * 1024}
    for (target, shared), line in zip(most.items(), done.splitlines(), strict=True):
        usage = [int(number) for number in line.split()]
        assert len(usage) == 3 * 2
        assert max(usage[::3]) <= shared
        assert min(usage[1::3]) > 0
        # On gfx942 one register of a window's 256 does not fit.
        assert max(usage[2::3]) <= (target == "gfx942")


def test_soft_cap(device: str) -> None:
    """Logits that would be far above the cap."""
    case = attended(SMALL, [(1, 90), (9, 40)], device)
    case.windows.queries.mul_(20)
    found = attend(case, cap=5.0)
    assert_attended(case, found, cap=5.0)
    assert found.lse[0].max() < 5 + torch.tensor(90.0).log()


def test_rows_with_all_pages_are_dense_attention(device: str) -> None:
    """The twin itself, against torch's own attention."""
    case = attended(Shape(16, 2, 3, 64, torch.float16), [(40, 40)], device)
    shared = case.rows.table[:1].expand(2, -1).contiguous()
    case = case._replace(rows=PageRows(shared, torch.full_like(case.rows.lengths, 40)))
    cache = torch.randn(2, 99, 16, 2, 64).to(device, torch.float16)
    case = case._replace(cache=PagedCache(*cache))
    keys, values = (
        tensor[shared[0].long()].flatten(0, 1)[:40].transpose(0, 1).double() for tensor in cache
    )  # [Hk, 40, D]
    queries = case.windows.queries.transpose(0, 1).double()  # [H, 40, D]
    dense = torch.nn.functional.scaled_dot_product_attention(
        queries[None], keys.repeat_interleave(3, 0)[None], values.repeat_interleave(3, 0)[None],
        is_causal=True,
    )  # fmt: skip
    exact = results(case, torch.float64, torch.float64)
    paged_attention_reference(*case, 64**-0.5, 1, *exact)
    torch.testing.assert_close(exact.out, dense[0].transpose(0, 1), rtol=0, atol=1e-12)
    assert_attended(case, attend(case))


def test_a_pool_of_single_heads(device: str) -> None:
    """Slots hold a page of one head; the table names slots."""
    case = attended(SMALL, [(1, 70), (3, 33)], device)
    keys, values = (tensor.clone() for tensor in case.cache[:2])  # [pages, P, Hk, D]
    slots = torch.stack([keys, values], 1).permute(0, 3, 1, 2, 4).flatten(0, 1).contiguous()
    head = torch.arange(len(case.rows.table), device=device)[:, None] % SMALL.kv_heads
    rows = case.rows._replace(table=(case.rows.table * SMALL.kv_heads + head).int())
    pool = PagedCache(
        *(slots[:, part, :, None].expand(-1, -1, SMALL.kv_heads, -1) for part in (0, 1))
    )
    expected, found = attend(case), attend(case._replace(rows=rows, cache=pool))
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)


def test_a_request_gets_the_same_alone(device: str) -> None:
    """To the bit, in parts of equal number."""
    case = attended(SMALL, [(1, 200), (1, 77), (1, 140)], device)
    together = attend(case, 4)
    windows, heads = case.windows, SMALL.kv_heads
    for s in range(3):
        alone = Attended(
            windows._replace(
                token_start=windows.token_start[s : s + 1], num_tokens=windows.num_tokens[:1]
            ),
            PageRows(*(tensor[s * heads : (s + 1) * heads] for tensor in case.rows)),
            case.cache,
        )
        found = attend(alone, 4)
        assert torch.equal(found.out[s], together.out[s])
        assert torch.equal(found.lse[s], together.lse[s])


def test_other_tokens_are_left_alone(device: str) -> None:
    case = attended(SMALL, [(4, 20), (2, 9)], device)
    windows = case.windows._replace(num_tokens=case.windows.num_tokens - 1)
    lengths = case.rows.lengths - 1
    found = attend(case._replace(windows=windows, rows=case.rows._replace(lengths=lengths)))
    is_untouched = (found.out == LEFT_ALONE).all(-1).all(-1)
    assert is_untouched.tolist() == [False, False, False, True, False, True]
    assert ((found.lse == LEFT_ALONE).all(-1) == is_untouched).all()


def test_a_query_that_is_nan_has_no_answer(device: str) -> None:
    """Nor does it hide, in parts or whole; the other queries have theirs."""
    case = attended(SMALL, [(2, 150)], device)
    expected = attend(case)
    case.windows.queries[0, 1, 7] = torch.nan
    for found in (attend(case), attend(case, 3)):
        assert found.out[0, 1].isnan().all()
        assert found.out.isnan().sum() == 64
        assert found.lse[0, 1].isnan()
    assert torch.equal(attend(case).out[1], expected.out[1])


def test_what_cannot_be_read_is_refused(device: str) -> None:
    case = attended(SMALL, [(1, 40)], device)
    windows, rows, cache = case
    out = results(case, torch.float16, torch.float32).out
    parts = scratch(case, 2)
    odd = torch.zeros(9, 16, 2, 72, dtype=torch.float16, device=device)[..., :64]
    half = PagedCache(cache.keys[:, :8], cache.values[:, :8])
    wide = windows._replace(queries=windows.queries.float())
    wrong = [
        ("queries must be bfloat16 or float16", (wide, rows, cache), None),
        (
            r"values must be float16 \[",
            (windows, rows, cache._replace(values=cache.values.bfloat16())), None,
        ),
        ("multiples of 16", (windows, rows, PagedCache(odd, odd)), None),
        ("Page size must be one of", (windows, rows, half), None),
        (
            r"key_scale must be float32 \[1\]",
            (windows, rows, cache._replace(key_scale=torch.ones(2, device=device))), None,
        ),
        (
            r"table must be int32 \[2, W\]",
            (windows, rows._replace(table=rows.table[:1]), cache), None,
        ),
        (r"parts\.lse must be float32 \[2, 1, 6\]", case, parts._replace(lse=parts.lse[:1])),
    ]  # fmt: skip
    for sentence, given, scratched in wrong:
        with pytest.raises(ValueError, match=sentence):
            paged_attention(*given, 1.0, 1, out, None, scratched)
    with pytest.raises(ValueError, match="longest must be 1 or more"):
        paged_attention(*case, 1.0, 0, out)
