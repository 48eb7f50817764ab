"""What windows give to their local keys: shares of a softmax, as accurate as plain torch's."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.local_mass import local_mass, local_mass_reference
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.local import Local, Shape, Window, local_of

SCALE = 0.25
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        Shape(32, 2, 1, 64, torch.float32),
        Shape(64, 1, 3, 80, torch.float32),
        Shape(128, 2, 4, 128, torch.bfloat16),
        Shape(32, 1, 8, 64, torch.float16),
        Shape(16, 3, 2, 80, torch.float16),
    ],
    ids=["page32", "page64-g3-d80", "page128-g4-bf16", "page32-g8-fp16", "page16-d80-fp16"],
)
ONE = Shape(32, 1, 2, 64, torch.float32)


def windows_of(page: int) -> list[Window]:
    """Of a prompt, its last one, decoded tokens that count, one that does not."""
    return [
        Window(0, 64, 64, 1 if page < 64 else 0),
        Window(0, 128, 41, 64 // page),
        Window(1, 191, 1, 128 // page),
        Window(2, 0, 37, 0),
        Window(2, 40, 1, 0),
        Window(1, 223, 1, 3 if page == 64 else 192 // page),
    ]


def given(local: Local, every: int = 32, rows: int | None = None) -> list[torch.Tensor]:
    """``[W, Hk, K]`` by the kernel, by its twin, and by that in float64."""
    windows, page = local.windows, local.keys.shape[1]
    heads, kv_heads = windows.queries.queries.shape[1], local.keys.shape[2]
    most = 8 * page if page < 128 else 3 * page
    size = len(windows.request), kv_heads
    device = local.keys.device
    found, plain, exact = (
        torch.empty(*size, most, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    scratch = torch.empty(*size, 2, rows or 64 // every * heads // kv_heads, device=device)
    local_mass(windows, local.keys, every, SCALE, scratch, found)
    for out in (plain, exact):
        local_mass_reference(windows, local.keys, every, SCALE, None, out)
    return [found, plain, exact]


@SHAPES
@pytest.mark.parametrize("every", [32, 8])
def test_accuracy(shape: Shape, every: int, device: str) -> None:
    """Each query gives 1, spread over the local keys that it sees."""
    local = local_of(shape, windows_of(shape.page), device)
    found, plain, exact = given(local, every)
    # A share is rounded a few times; logits of up to 60 are known within 64 roundings of that.
    assert_accurate(found, plain, exact, 16 * EPS * exact.max().item())
    windows = local.windows
    for w, (end, tokens) in enumerate(
        zip(windows.context_end.tolist(), windows.queries.num_tokens.tolist(), strict=True)
    ):
        number = end // every - (end - tokens) // every
        total = found[w].double().sum(-1)
        assert torch.allclose(total, total.new_tensor(number * shape.group), rtol=1e-5)
        keys = end - int(windows.first_page[w]) * shape.page
        assert (found[w, :, keys:] == 0).all()


def test_equal_keys_share_what_a_query_gives(device: str) -> None:
    """A query that sees ``n`` local keys gives each of them ``1 / n``."""
    local = local_of(ONE, [Window(0, 32, 64, 1)], device)
    local.windows.queries.queries.zero_()
    found = given(local)[0][0, 0, :64].double().cpu()
    first, second = 2 / 32, 2 / 64
    expected = torch.tensor([first + second] * 32 + [second] * 32).double()
    assert torch.allclose(found, expected, rtol=4 * EPS)


def test_the_local_region_may_begin_behind_a_query(device: str) -> None:
    """At a context's start, where the sinks are not local: it gives nothing."""
    local = local_of(ONE, [Window(0, 0, 64, 1)], device)
    found, _, exact = given(local)
    assert torch.allclose(found.double(), exact, rtol=1e-5)
    assert (exact[0, 0, :32] > 0).all()
    assert abs(float(found.sum()) - 2) < 1e-5


# The interpreter warns of infinity less infinity, and of a product that is infinite.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e37])
def test_what_is_no_number_gives_and_gets_nothing(bad: float, device: str) -> None:
    """Keys that are not, and queries, whose others go on; as on CPU."""
    local = local_of(ONE._replace(kv_heads=2), [Window(0, 64, 64, 1)], device)
    clean = given(local)[0]
    local.keys[local.pages[0, 2], 6, 1, 3] = bad  # the context's 70th
    queries = local.windows.queries.queries
    queries[31, 0, :] = bad
    found, plain, exact = given(local)
    assert found.isfinite().all()
    assert_accurate(found, plain, exact, 16 * EPS)
    assert found[0, 1, 38] == 0
    assert torch.equal(found[0, 1, 64:] > 0, clean[0, 1, 64:] > 0)
    # Of KV head 0, whose keys are as they were, one of four queries gives nothing.
    assert abs(float(found[0, 0].sum()) - 3) < 1e-5
    assert abs(float(found[0, 1].sum()) - 4) < 1e-5


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_no_key_that_is_a_number(device: str) -> None:
    local = local_of(ONE, [Window(0, 64, 32, 2)], device)
    local.keys.fill_(torch.nan)
    assert (given(local)[0] == 0).all()


@SHAPES
def test_the_same_bits_alone_or_in_a_batch(shape: Shape, device: str) -> None:
    """What a window gives depends on nothing but the window, however large the scratch is."""
    made = windows_of(shape.page)
    local = local_of(shape, made, device)
    together = given(local)[0]
    for w in range(len(made)):
        alone = local.windows.span(w, w + 1)
        found = given(local._replace(windows=alone), rows=200)[0]
        assert torch.equal(found[0], together[w])


def test_what_cannot_be_read_is_refused(device: str) -> None:
    local = local_of(ONE, [Window(0, 64, 32, 1)], device)
    rows, out = torch.empty(1, 1, 2, 2, device=device), torch.empty(1, 1, 96, device=device)
    arguments = local.windows, local.keys, 32, SCALE, rows, out
    with pytest.raises(ValueError, match="must have one dtype"):
        local_mass(arguments[0], local.keys.half(), *arguments[2:])
    with pytest.raises(ValueError, match="every >= 1, not 0"):
        local_mass(*arguments[:2], 0, *arguments[3:])
    with pytest.raises(ValueError, match=r"rows must be float32 \[1, 1, 2, R\]"):
        local_mass(*arguments[:4], rows[:, :, :1], out)
    wrong = local.windows._replace(first_page=local.windows.first_page.long())
    with pytest.raises(ValueError, match=r"first_page must be int32 \[1\]"):
        local_mass(wrong, *arguments[1:])
