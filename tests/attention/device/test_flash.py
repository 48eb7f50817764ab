"""FlashAttention through views of single heads: a stand-in of its function, with its signature.

The real one needs a GPU and was never called.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from kvplug.attention.attend.flash import FlashAttend, vllm_function
from kvplug.attention.attend.triton import cache_of
from kvplug.errors import KvplugError
from tests.attention.device.stock import stand_in
from tests.attention.device.test_impl import MIXED, SHAPES
from tests.attention.device.world import World
from tests.made_up import Piece

CALLS: list[int] = []
"""Sequences of each call."""


def names_of_flash() -> set[str]:
    """Arguments of vLLM's function, read from its source: its module needs CUDA extensions."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func":
            return {argument.arg for argument in node.args.args}
    raise AssertionError("no flash_attn_varlen_func")


def stand_in_for_flash(**call: Any) -> None:
    """What vLLM documents of ``flash_attn_varlen_func``, in float64."""
    assert call.keys() <= names_of_flash()
    assert call["causal"]
    assert call["num_splits"] == 1
    queries, out, starts = call["q"], call["out"], call["cu_seqlens_q"].tolist()
    lengths, table = call["seqused_k"], call["block_table"]
    assert out.shape == queries.shape
    assert starts[-1] == len(queries)
    for column in (call["cu_seqlens_q"], lengths, table):
        assert column.dtype == torch.int32
    assert lengths.is_contiguous()
    assert table.stride(-1) == 1
    assert int(lengths.max()) <= call["max_seqlen_k"]
    assert int(table.max()) < len(call["k"])
    assert int(table.min()) >= 0
    CALLS.append(len(lengths))
    page = call["k"].shape[1]
    for s, length in enumerate(lengths.tolist()):
        mine = queries[starts[s] : starts[s + 1]].double()  # [c, G, D]
        assert 1 <= len(mine) <= call["max_seqlen_q"]
        pages = table[s, : -(-length // page)].long()
        keys, values = (
            call[side][pages][:, :, 0].flatten(0, 1)[:length].double() for side in ("k", "v")
        )
        logits = torch.einsum("cgd,ld->cgl", mine, keys) * call["softmax_scale"]
        if call["softcap"]:
            logits = call["softcap"] * (logits / call["softcap"]).tanh()
        positions = torch.arange(length, device=mine.device)
        unseen = positions > positions[length - len(mine) :, None]
        shares = logits.masked_fill(unseen[:, None], -torch.inf).softmax(-1)
        out[starts[s] : starts[s + 1]] = (shares @ values).to(out.dtype)


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_it_attends_as_our_own_kernel_does(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded tokens in one call, windows in one call a head; others' outputs are left alone."""
    shape = SHAPES["g2"]
    stand_in(monkeypatch, shape)
    world = World("streaming", shape, "LBNHC")
    pieces = [MIXED[0], Piece(1, 128, 37, True), MIXED[2]]
    world.fill(pieces)
    world.enter(pieces)
    metadata = world.metadata
    assert metadata is not None
    assert metadata.plan is not None
    assert metadata.plan.sparse is not None
    assert world.impl.stages is not None
    sparse, queries = metadata.plan.sparse, world.new(pieces, 2)
    rows = world.impl.stages.select(queries, metadata.plan, sparse)
    places = torch.arange(rows.table.shape[1], device=rows.table.device)
    filled = rows.lengths[:, None] > places * shape.page
    rows = rows._replace(table=rows.table.where(filled, 0))  # as where it is chosen by option
    cache, ours = cache_of(world.cache), torch.full_like(queries, torch.nan)
    theirs = ours.clone()
    world.impl.attend.window, world.impl.attend.cap = 32, cap  # type: ignore[union-attr]
    world.impl.attend(queries, ours, cache, sparse, rows)  # type: ignore[misc]
    CALLS.clear()
    flash = FlashAttend(32, world.impl.scale, cap, stand_in_for_flash)
    flash(queries, theirs, cache, sparse, rows)
    assert CALLS == [2, 2, 2]
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[-1].isnan().all()
    assert (ours - theirs).nan_to_num().abs().max() < 2.0**-9


def test_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by option."""
    shape = SHAPES["g3"]
    stand_in(monkeypatch, shape)
    monkeypatch.setattr(
        "kvplug.attention.device.impl.vllm_function", lambda dim, has_cap: stand_in_for_flash
    )
    world = World("streaming", shape, options={"attend": "flash"})
    pieces = [Piece(0, 230, 1, False), Piece(1, 191, 1, False)]
    world.fill(pieces)
    assert isinstance(world.impl.attend, FlashAttend)
    found = world.step(pieces)
    assert (found.double().cpu() - world.expected(pieces)).abs().max() < 2.0**-7


def test_where_vllm_has_none_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: False)
    with pytest.raises(KvplugError, match="no FlashAttention here"):
        vllm_function(128, False)
