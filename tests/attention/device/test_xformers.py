"""xformers' own kernel through views of single heads, in Triton's interpreter; never on a GPU.

It has no wheels but for x86-64, and takes no tensors on a CPU until it is told to.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Any

import pytest
import torch
import triton
from packaging.version import Version

from kvplug.attention.attend import xformers as ours
from kvplug.attention.attend import xformers_operator
from kvplug.attention.attend.triton import cache_of
from kvplug.attention.attend.xformers import XformersAttend, runs
from kvplug.attention.attend.xformers_operator import TRITON_BEFORE, operator_of
from kvplug.errors import KvplugError
from tests.attention.device.block_pointers import Language
from tests.attention.device.pooled import PooledWorld
from tests.attention.device.stock import stand_in
from tests.attention.device.test_impl import MIXED, ROUNDING
from tests.attention.device.world import DEVICE, SMALL, Shape, World, empty_cache
from tests.kernels.conftest import HAS_GPU
from tests.made_up import Piece

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="xformers has wheels for x86-64 alone"
)
ALONE = Shape(3, 1, 64, 32)
WIDE = Shape(1, 8, 128, 32)
LARGE = Shape(1, 2, 256, 32)
HEAD_MAJOR = ("LBHNC", "LHBNC", "BLHNC", "BHLNC")


@pytest.fixture(autouse=True)
def calls(triton_of_kernels: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of each call; without a GPU, xformers is told that the CPU is one."""
    from xformers.ops import fmha

    if not HAS_GPU:
        monkeypatch.setattr(fmha.triton_splitk.FwOp, "SUPPORTED_DEVICES", {"cpu"})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        if Version(triton.__version__) >= TRITON_BEFORE:
            kernels = importlib.import_module("xformers.ops.fmha._triton.splitk_kernels")
            language = kernels.tl
            # Under some name the interpreter must find Triton's own.
            monkeypatch.setattr(kernels, "language", language, raising=False)
            monkeypatch.setattr(kernels, "tl", Language(language))
            monkeypatch.setattr(xformers_operator, "TRITON_BEFORE", Version("99"))
    made: list[int] = []
    original = fmha.memory_efficient_attention_forward

    def counted(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        made.append(query.shape[1])
        return original(query, *rest, **options)

    monkeypatch.setattr(fmha, "memory_efficient_attention_forward", counted)
    return made


def world_of(shape: Shape, layout: str, monkeypatch: pytest.MonkeyPatch) -> World:
    stand_in(monkeypatch, shape)
    return World("streaming", shape, layout, options={"attend": "xformers"})


@pytest.mark.parametrize("slots", [16, 100], ids=["in turns", "at once"])
def test_it_reads_a_hot_pool(slots: int, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit as it reads the cache; all heads in one call, though the cache is token-major."""
    plain = world_of(SMALL, "LBNHC", monkeypatch)
    pooled = PooledWorld("streaming", slots, SMALL, "LBNHC", options={"attend": "xformers"})
    for world in (plain, pooled):
        world.fill(MIXED)
    expected = plain.step(MIXED)
    separate = len(calls)
    assert torch.equal(pooled.step(MIXED), expected)
    assert separate == 4
    assert len(calls) - separate == (2 if slots == 100 else pooled.turns)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("shape", [SMALL, ALONE, WIDE, LARGE], ids=["g2", "g1", "g8", "256"])
def test_a_mixed_step(
    shape: Shape, layout: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded tokens, and windows of 32, 5 and 6 tokens in pieces of 16, against float64."""
    world = world_of(shape, layout, monkeypatch)
    assert isinstance(world.impl.attend, XformersAttend)
    world.fill(MIXED)
    found = world.step(MIXED)
    assert (found.double().cpu() - world.expected(MIXED)).abs().max() < 4 * ROUNDING
    views = 1 if layout == "LBHNC" else shape.kv_heads
    heads = shape.kv_heads // views
    # Two of one token are sparse; of several, four windows of two pieces each.
    assert calls == [2 * heads] * views + [4 * 2 * 16 * heads] * views


def test_the_same_request_gets_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: alone or in a batch."""
    world = world_of(SMALL, "LBHNC", monkeypatch)
    pieces = [MIXED[0], Piece(1, 128, 37, True), MIXED[4]]
    world.fill(pieces)
    together = world.step(pieces).split([piece.tokens for piece in pieces])
    for piece, found in zip(pieces, together, strict=True):
        assert torch.equal(world.step([piece]), found)


@pytest.mark.parametrize(
    ("window", "piece"),
    [
        (16, Piece(0, 128, 34, True)),
        (48, Piece(0, 144, 98, True)),
        (128, Piece(0, 128, 128, True)),
        (256, Piece(0, 256, 3, True)),
    ],
    ids=["16", "48", "128", "256"],
)
def test_windows_of_any_length(window: int, piece: Piece, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kvplug's own kernel attends: whole windows, and last ones of 2 and 3 tokens."""
    shape, pieces = SMALL, [piece]
    stand_in(monkeypatch, shape)
    world = World("streaming", shape, "BHLNC", window=window)
    world.fill(pieces)
    world.enter(pieces)
    metadata = world.metadata
    assert metadata is not None
    assert metadata.plan is not None
    sparse = metadata.plan.sparse
    assert sparse is not None
    assert world.impl.stages is not None
    queries = world.new(pieces, 2)
    rows = world.impl.stages.select(queries, metadata.plan, sparse)
    cache, wanted = cache_of(world.cache), torch.full_like(queries, torch.nan)
    found = wanted.clone()
    world.impl.attend(queries, wanted, cache, sparse, rows)  # type: ignore[misc]
    operator = operator_of(shape.dim, shape.page, False, DEVICE.type)
    XformersAttend(window, world.impl.scale, operator)(queries, found, cache, sparse, rows)
    assert torch.equal(wanted.isnan(), found.isnan())
    assert not found.isnan().all()
    assert (wanted - found).nan_to_num().abs().max() < ROUNDING


@pytest.mark.parametrize("layout", [*HEAD_MAJOR, "LBNHC", "BLNHC"])
def test_layouts(layout: str) -> None:
    """One view where a head's page is a piece of a run of tokens, else one a head; all its own."""
    kv_cache = empty_cache(SMALL, layout)
    kv_cache.copy_((torch.arange(kv_cache.numel(), device=DEVICE) % 1999).view(kv_cache.shape))
    cache = cache_of(kv_cache)
    views = runs(cache)
    assert len(views) == (1 if layout in HEAD_MAJOR else 2)
    pages = torch.arange(SMALL.num_pages, dtype=torch.int32, device=DEVICE).expand(1, 2, -1)
    found = []
    for view in views:
        tokens = view.keys.view(-1, SMALL.page, SMALL.dim)
        found.append(tokens[view.table(pages[:, : 2 // len(views)])[0].long()])
    assert torch.equal(torch.cat(found), cache.keys.permute(2, 0, 1, 3))


def test_pages_at_odd_distances_are_refused() -> None:
    memory = torch.zeros(5 * 16 * 64 + 64)
    side = memory.as_strided((4, 16, 1, 64), (16 * 64 + 8, 64, 64, 1))
    cache = cache_of(empty_cache(SMALL, "LBHNC"))._replace(keys=side, values=side)
    with pytest.raises(KvplugError, match="1032 numbers apart"):
        runs(cache)


def test_too_many_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MOST_ROWS", 1600)
    with pytest.raises(KvplugError, match="cannot count the 1600 places"):
        runs(cache_of(empty_cache(SMALL, "LBHNC")))


@pytest.mark.parametrize(("page", "keys"), [(32, 32), (64, 64), (128, 64)])
def test_nothing_is_left_for_the_batch_to_choose(page: int, keys: int) -> None:
    """One part whatever the batch; the kernel wants pages of whole blocks."""
    operator = operator_of(128, page, False, DEVICE.type)
    parts, block = operator.SPLIT_K, operator.BLOCK_N
    assert (parts, block) == (1, keys)
    assert not operator.AUTOTUNE


def test_what_it_does_not_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence, when an engine starts."""
    with pytest.raises(KvplugError, match="cannot cap logits"):
        operator_of(64, 32, True, DEVICE.type)
    for dim in (80, 96):
        with pytest.raises(KvplugError, match=f"heads of {dim} in pages of 32 .*Embed dim {dim}"):
            operator_of(dim, 32, False, DEVICE.type)
    monkeypatch.setattr("xformers.ops.fmha.triton_splitk.FwOp.SUPPORTED_DEVICES", {"moon"})
    with pytest.raises(KvplugError, match=r"device=.* \(supported: \{'moon'\}\)"):
        operator_of(64, 32, False, DEVICE.type)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were not read, a Triton without block pointers, and none at all."""
    for version in ("0.0.34", "0.0.36"):
        with monkeypatch.context() as patch:
            patch.setattr("xformers.__version__", version)
            with pytest.raises(KvplugError, match=rf"needs xformers .*0\.0\.35.*, not {version}"):
                operator_of(64, 32, False, DEVICE.type)
    with monkeypatch.context() as patch:
        patch.setattr(xformers_operator, "TRITON_BEFORE", Version("0"))
        with pytest.raises(KvplugError, match="no longer has"):
            operator_of(64, 32, False, DEVICE.type)
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(KvplugError, match=r"needs kvplug\[xformers\], which cannot be imported"):
        operator_of(64, 32, False, DEVICE.type)
