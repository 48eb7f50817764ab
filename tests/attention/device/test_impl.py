"""The layer for CUDA attends to the pages that the pipeline on CPU selects, and to no others.

Everything runs in Triton's interpreter on CPU tensors; vLLM's own kernel has a stand-in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attention.device.stock import stand_in
from tests.attention.device.world import SMALL, Shape, World
from tests.made_up import Piece

SHAPES = {
    "g2": SMALL,
    "g1": Shape(3, 1, 80, 32),
    "g3": Shape(1, 3, 96, 32),
    "g8": Shape(1, 8, 128, 16),
}
MIXED = [
    Piece(0, 150, 1, False),
    Piece(1, 128, 37, True),  # sparse windows, the last one of 5 tokens
    Piece(2, 40, 1, False),  # dense
    Piece(3, 32, 70, True),  # dense, then sparse
    Piece(4, 201, 1, False),
]
FEWER: dict[str, dict[str, Any]] = {
    name: {"last": 2, "active": 1} for name in ("channels", "simhash")
}
"""Probes of a window."""
LAST = {"probe": {"name": "last_activated", "last": 2, "active": 1}}
ROUNDING = 2.0**-9
"""Float16 outputs of about 1, sums of float16 products."""


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double().cpu() - expected).abs().max() < 4 * ROUNDING)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("channels", FEWER["channels"]),
        ("simhash", FEWER["simhash"]),
        ("quest", {}),
        ("streaming", {}),
        ("channels", {"probe": "mean"}),
        ("simhash", {"probe": "mean"}),
        ("quest", LAST),
    ],
    ids=str,
)
def test_a_mixed_step(
    policy: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded tokens, sparse and dense windows in one step; vLLM's kernel has the dense ones."""
    shape = SHAPES["g2"]
    stock = stand_in(monkeypatch, shape)
    world = World(policy, shape, options=options)
    world.fill(MIXED)
    found = world.step(MIXED)
    assert close(found, world.expected(MIXED))
    # The short request, and windows of the fourth: without a budget the second has far pages.
    assert stock.tokens == [1 + (32 if policy == "streaming" else 64)]


@pytest.mark.parametrize("policy", ["channels", "quest"])
@pytest.mark.parametrize(
    ("name", "layout"), [("g1", "LBNHC"), ("g3", "BLNHC"), ("g8", "LBHNC")], ids=["g1", "g3", "g8"]
)
def test_decoding(policy: str, name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layout that vLLM's cache can have."""
    shape = SHAPES[name]
    stand_in(monkeypatch, shape)
    pieces = [Piece(0, 230, 1, False), Piece(1, 191, 1, False)]
    world = World(policy, shape, layout)
    world.fill(pieces)
    assert close(world.step(pieces), world.expected(pieces))


@pytest.mark.parametrize("policy", ["simhash", "quest"])
def test_a_request_from_its_first_token(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks of whole windows, then decoded, beside another one step behind."""
    shape = SHAPES["g2"]
    stand_in(monkeypatch, shape)
    world = World(policy, shape, options=FEWER.get(policy, {}))
    chunks = [(0, 64), (64, 96), (160, 31), (191, 1), (192, 1), (193, 1)]  # pages are filled at 192
    for number in range(len(chunks) + 1):
        pieces = [
            Piece(request, *chunks[n], chunks[n][0] < 191)
            for request, n in enumerate((number, number - 1))
            if 0 <= n < len(chunks)
        ]
        assert close(world.step(pieces), world.expected(pieces))


@pytest.mark.parametrize("policy", ["simhash", "quest"])
def test_the_same_request_gets_the_same_answer(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: alone or in a batch, and with all windows at once or one after the other."""
    shape = SHAPES["g2"]
    stand_in(monkeypatch, shape)
    world = World(policy, shape, options=FEWER.get(policy, {}))
    pieces = [MIXED[0], Piece(1, 128, 37, True), MIXED[4]]
    world.fill(pieces)
    together = world.step(pieces).split([piece.tokens for piece in pieces])
    for piece, found in zip(pieces, together, strict=True):
        assert torch.equal(world.step([piece]), found)
    monkeypatch.setattr("kvplug.attention.device.pipeline.SCRATCH", 1)
    in_turns = world.step(pieces).split([piece.tokens for piece in pieces])
    assert all(map(torch.equal, in_turns, together))


@pytest.mark.parametrize("policy", ["channels", "infllm"])
def test_rows_of_padding(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph between attention calls runs for more tokens than there are."""
    shape = SHAPES["g2"]
    stand_in(monkeypatch, shape)
    for pieces in (MIXED[:3], [MIXED[2]]):
        plain, padded = World(policy, shape), World(policy, shape)
        for world in (plain, padded):
            world.fill(pieces)
        found = plain.step(pieces)
        metadata, *new = padded.enter(pieces)
        queries, keys, values = (
            torch.cat([part, part.new_full((3, *part.shape[1:]), torch.nan)])
            for part in (padded.queries(pieces, 0), *new)
        )
        output = torch.full_like(queries, 7)
        padded.impl.forward(None, queries, keys, values, padded.cache, metadata, output)
        assert torch.equal(output[:-3], found)
        assert (output[-3:] == 7).all()


def test_a_profiling_run_and_dense_layers_are_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["g2"]
    stock = stand_in(monkeypatch, shape)
    world = World("dense", shape)
    world.fill([MIXED[0]])
    assert close(world.step([MIXED[0]]), world.expected([MIXED[0]]))
    assert stock.tokens == [1]
    assert world.impl.stages is None
    assert world.builder.pipeline.counts.dense_tokens == 150 + 1
