"""What steps launch is compiled before the first request, as far as Triton's rules tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from vllm.v1.worker.block_table import get_block_table_width

from kvplug.attention.device.warm_up import warm_up
from tests.attention.device.pooled import PooledWorld
from tests.attention.device.stock import stand_in
from tests.attention.device.world import DTYPE, LONGEST, SMALL, World
from tests.made_up import Piece

Program = tuple[Any, ...]
STEPS = (
    [Piece(0, 150, 1, False)],
    [Piece(0, 151, 1, False), Piece(1, 140, 1, False), Piece(2, 201, 1, False)],
    [Piece(1, 141, 1, False), Piece(3, 160, 32, True)],
    [Piece(3, 192, 32, True)],
    [Piece(0, 152, 1, False), Piece(2, 202, 1, False), Piece(3, 224, 20, True)],
)


@contextmanager
def launched() -> Iterator[set[Program]]:
    """Programs that Triton would have compiled: one for each set of what it specialises on."""
    function: Any = import_module("triton.runtime.interpreter").InterpretedFunction
    run = function.run
    found: set[Program] = set()

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        free = kernel.kwargs.get("do_not_specialize") or ()
        known = [kernel.fn.__name__]
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            is_constant = "constexpr" in str(parameter.annotation)
            value = given[name]
            known.append(value if is_constant else kind_of(value, is_free=name in free))
        found.add(tuple(known))
        run(kernel, *args, **kwargs)

    function.run = note
    try:
        yield found
    finally:
        function.run = run


def kind_of(value: Any, *, is_free: bool) -> Any:
    """What Triton knows of an argument that is no constant."""
    if isinstance(value, torch.Tensor):
        return value.dtype, is_free or value.data_ptr() % 16 == 0
    if isinstance(value, int) and not is_free:
        return value == 1, value % 16 == 0, value.bit_length() > 31
    return type(value)


@pytest.mark.parametrize(
    ("policy", "slots"),
    [("channels", 0), ("simhash", 0), ("quest", 0), ("actqkv", 0), ("hax", 0),
     ("channels", 24), ("channels", 80)],
)  # fmt: skip
def test_later_steps_compile_nothing(
    policy: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request or several, other lengths, windows that are not whole; in turns or at once."""
    stand_in(monkeypatch, SMALL)
    shape = SMALL._replace(num_pages=90)
    world = PooledWorld(policy, slots, shape) if slots else World(policy, shape)
    table, width = world.table, get_block_table_width(-(-LONGEST // shape.page), shape.page)
    monkeypatch.setattr(
        world, "table", lambda pieces: pad(table(pieces), (0, width))[:, :width].contiguous()
    )  # vLLM's table has one width
    with launched() as before:
        assert warm_up(world.impl, DTYPE, LONGEST)
    for pieces in STEPS:
        world.fill([piece for piece in pieces if piece.request not in world.pages])
    with launched() as after:
        for pieces in STEPS:
            world.step(pieces)
    assert len(before) > 5
    assert sorted(map(str, after - before)) == []


def test_nothing_of_it_is_counted_or_selected_later(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, SMALL)
    world = World("channels")
    assert warm_up(world.impl, DTYPE, LONGEST)
    assert world.builder.pipeline.counts.sparse_windows == 0
    pieces = STEPS[1]
    world.fill(pieces)
    world.step(pieces)
    world.expected(pieces)
    assert world.selected()[0] == world.on_cpu_selected[0]


@pytest.mark.parametrize("longest", [64, 128])
def test_contexts_that_never_select_need_none(longest: int) -> None:
    assert not warm_up(World("channels").impl, DTYPE, longest)
