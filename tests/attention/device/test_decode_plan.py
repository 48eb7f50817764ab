"""Steps of decoded tokens as CUDA graphs: captured once, replayed with other requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kvplug.attention.device.decode_plan import DecodePlans
from kvplug.attention.device.plan import Lengths
from kvplug.errors import KvplugError
from tests.attention.device.stock import stand_in
from tests.attention.device.test_impl import close
from tests.attention.device.test_plan import lengths_of
from tests.attention.device.world import DEVICE, DTYPE, SMALL, Selected, World
from tests.made_up import Piece
from tests.pretended_graph import PretendedGraph

ROWS = 4
"""Of the batch that is captured."""
WIDTH = 20
"""Pages of the block table."""
POLICIES = ("channels", "simhash", "quest", "streaming")


def decoded(*at: int) -> list[Piece]:
    """One token of requests 0, 1, ... at these positions."""
    return [Piece(request, position, 1, False) for request, position in enumerate(at)]


class Captured:
    """A layer's step as a graph, with the memory that vLLM's model runner keeps for it.

    Args:
        world: Whose layers.
    """

    def __init__(self, world: World) -> None:
        shape, self.world = world.shape, world
        heads = shape.kv_heads * shape.group
        self.queries = torch.zeros(ROWS, heads, shape.dim, dtype=DTYPE, device=DEVICE)
        self.keys = torch.zeros(ROWS, shape.kv_heads, shape.dim, dtype=DTYPE, device=DEVICE)
        self.values, self.output = torch.zeros_like(self.keys), torch.zeros_like(self.queries)
        self.table = torch.zeros(ROWS, WIDTH, dtype=torch.int32, device=DEVICE)
        self.slots = torch.full((ROWS,), -1, device=DEVICE)
        self.graph = PretendedGraph()
        metadata = world.builder.build_for_cudagraph_capture(self.common([1] * ROWS, ROWS))
        with self.graph.capture():
            world.impl.forward(
                None, self.queries, self.keys, self.values, world.cache, metadata, self.output
            )
        self.rows = world.rows[0]
        """That the graph writes."""

    def common(self, ends: list[int], requests: int) -> CommonAttentionMetadata:
        """A padded batch, as vLLM's model runner has it for a whole graph."""
        starts = torch.arange(ROWS + 1, dtype=torch.int32).clamp(max=requests)
        lengths = torch.tensor(ends + [0] * (ROWS - len(ends)), dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE), query_start_loc_cpu=starts,
            seq_lens=lengths.to(DEVICE), num_reqs=ROWS, num_actual_tokens=ROWS, max_query_len=1,
            max_seq_len=int(lengths.max()), block_table_tensor=self.table,
            slot_mapping=self.slots, is_prefilling=torch.zeros(requests, dtype=torch.bool),
            seq_lens_cpu_upper_bound=lengths,
        )  # fmt: skip

    def step(self, pieces: list[Piece]) -> torch.Tensor:
        """Replays it for some requests; ``[T, H, D]``."""
        world, count = self.world, len(pieces)
        keys = world.put(pieces)
        self.queries[:count], self.keys[:count] = world.queries(pieces, 0), keys
        self.values[:count] = world.new(pieces, 1)
        slots = [world.slots(piece.request, piece.start, piece.stop) for piece in pieces]
        self.slots.fill_(-1)[:count] = torch.cat(slots)
        table = world.table(pieces)
        self.table.fill_(0)[:count, : table.shape[1]] = table
        ends = [piece.stop for piece in pieces]
        world.metadata = world.builder.build(0, self.common(ends, count))
        self.output.fill_(torch.nan)
        self.graph.replay()
        world.rows[0] = self.rows
        return self.output[:count].clone()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replayed_graph_attends_to_what_the_pipeline_on_cpu_selects(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense contexts beside sparse ones, other requests, fewer of them, some that begin."""
    stand_in(monkeypatch, SMALL)
    world = World(policy, options={"graphs": True})
    captured = Captured(world)
    world.fill([Piece(0, 150, 1, True), Piece(1, 40, 1, True), Piece(2, 30, 1, True)])

    def check(pieces: list[Piece]) -> Selected:
        found, expected = captured.step(pieces), world.expected(pieces)
        assert close(found, expected)
        sparse, mine = world.on_cpu_selected[0], world.selected()[0]
        assert {token: mine[token] for token in sparse} == sparse
        return sparse

    assert len(check(decoded(150, 40, 30))) == 1
    check(decoded(151, 41, 31))  # request 2 has all of its first tokens now
    check(decoded(152)[:1])
    world.step([Piece(2, 32, 100, True)])  # a prompt's windows, which no graph takes
    assert len(check([Piece(2, 132, 1, False), Piece(0, 153, 1, False)])) == 2
    assert len(check(decoded(154, 42, 133))) == 2


@pytest.mark.parametrize(
    ("policy", "kernels", "operators"),
    [("channels", 9, 0), ("simhash", 7, 0), ("quest", 6, 0), ("streaming", 3, 1)],
)
def test_a_layer_launches_few_kernels(policy: str, kernels: int, operators: int) -> None:
    """A launch costs the host 5 to 30 us where no graph is replayed, more than a small kernel."""
    names = Captured(World(policy, options={"graphs": True})).graph.names
    launched = [name for name in names if name.startswith("_")]
    others = [name for name in names if not name.startswith("_") and name != "fill_"]
    assert (len(launched), len(others)) == (kernels, operators)  # tests fill new memory with NaN


def test_a_graph_beside_none_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plan without a graph, as vLLM runs batches that it captured none for."""
    stand_in(monkeypatch, SMALL)
    world = World("channels", options={"graphs": True})
    captured = Captured(world)
    world.fill([Piece(0, 150, 1, True), Piece(1, 40, 1, True)])
    replayed = captured.step(decoded(150, 40))
    assert torch.equal(replayed, world.step(decoded(150, 40)))


@pytest.mark.parametrize(
    ("pieces", "serves"),
    [
        (decoded(150, 40), True),
        ([Piece(0, 150, 1, True)], True),  # vLLM runs the last token of a prompt as decoded
        ([Piece(0, 150, 1, False), Piece(1, 40, 2, True)], False),
    ],
    ids=["decoded", "last of a prompt", "a prompt"],
)
def test_which_steps_have_it(pieces: list[Piece], serves: bool) -> None:
    assert DecodePlans.serves(lengths_of(pieces)) is serves


def test_padding_behind_the_requests_is_no_reason_against_it() -> None:
    lengths = lengths_of(decoded(150, 40))
    start = torch.tensor([*lengths.query_start, 2, 2]).int().numpy()
    padded = Lengths(start, lengths.seq_lens, lengths.is_prefilling)
    assert DecodePlans.serves(padded)


def test_graphs_are_declared_where_they_are_asked_for() -> None:
    for options, support in (
        ({}, AttentionCGSupport.NEVER),
        ({"graphs": False}, AttentionCGSupport.NEVER),
        ({"graphs": True}, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
    ):
        world = World("streaming", options=options)
        spec: Any = None
        assert world.builder.get_cudagraph_support(world.vllm_config, spec) == support
        assert not world.builder.supports_draft_decode_metadata_update


def test_a_budget_that_graphs_have_stays() -> None:
    pipeline = World("streaming", options={"graphs": True}).builder.pipeline
    with pytest.raises(KvplugError, match="graphs keep theirs"):
        pipeline.set_budget(64)
    assert pipeline.config.budget == 32


def test_captures_are_not_counted() -> None:
    world = World("streaming", options={"graphs": True})
    Captured(world)
    assert world.builder.pipeline.counts.dense_tokens == 0
