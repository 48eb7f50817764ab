"""Layers of the backend for CUDA over a cache made by hand, and what should come of them.

A request is its content: the same name gives the same keys, values and queries at the same
positions. Pages are dealt out at random; page 0 belongs to nobody and holds NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvplug.attention.device.impl import DeviceImpl
from kvplug.attention.device.metadata import DeviceMetadata, DeviceMetadataBuilder
from kvplug.attention.device.plan import SparseWindows
from kvplug.config import KvplugConfig
from kvplug.kernels.page_rows import PageRows
from kvplug.layer_stages import LayerStages
from kvplug.page_reader import PageReader
from kvplug.page_table import PageTable
from kvplug.pipeline import Pipeline
from kvplug.stage import LayerShape
from kvplug.step import Step
from kvplug.windows import Batch
from tests.kernels.conftest import HAS_GPU
from tests.made_up import Piece

LONGEST = 260
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.float16
"""Triton's interpreter cuts bfloat16 off where a GPU rounds."""
OPTIONS = {"budget": 32, "sink": 16, "local": 32, "window": 32, "dense_below": 64}


class Shape(NamedTuple):
    """Sizes of the layer."""

    kv_heads: int = 2
    group: int = 2
    dim: int = 64
    page: int = 16
    num_pages: int = 50


SMALL = Shape()


Selected = dict[int, list[set[int]]]
"""Of every token of a step's sparse windows, each KV head's physical pages."""


class Content(NamedTuple):
    """Of a request, by position."""

    keys: torch.Tensor
    """``[LONGEST, Hk, D]``."""
    values: torch.Tensor
    queries: torch.Tensor
    """``[LONGEST, H, D]``."""


class World:
    """A layer of the backend, its cache, and the pipeline on CPU over the same keys.

    Further layers have the same keys; each one's queries are the first one's in another order.

    Args:
        policy: The recipe's name.
        shape: Sizes.
        layout: vLLM's name of the cache's physical order.
        layers: How many.
        options: Beside :data:`OPTIONS`.
    """

    def __init__(
        self, policy: str, shape: Shape = SMALL, layout: str = "LBHNC", layers: int = 1,
        **options: Any,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.config = KvplugConfig.parse({"policy": policy, **OPTIONS, **options})
        self.cache = empty_cache(shape, layout)
        self.metadata: DeviceMetadata | None = None
        """Of the last step."""
        self.pages: dict[int, list[int]] = {}
        self.content_of: dict[int, int] = {}
        """Requests with the content of another."""
        self._content: dict[int, Content] = {}
        self._free = (torch.randperm(shape.num_pages - 1) + 1).tolist()
        self.impls, self.builder, self.vllm_config = layers_of(shape, self.config, layers)
        self.impl = self.impls[0]
        self.geometry = geometry = LayerShape(
            num_pages=shape.num_pages, num_kv_heads=shape.kv_heads, page=shape.page,
            head_dim=shape.dim, layer=1, first_kv_head=0, seed=0,
            num_heads=shape.kv_heads * shape.group, num_layers=layers, rank=0,
            window=self.config.window, local=self.config.local, scale=self.impl.scale,
            softcap=0.0, dense_below=self.config.dense_below,
        )  # fmt: skip
        self.rows: list[PageRows | None] = [None] * layers
        """Of the last step's sparse windows, by layer."""
        for rank, impl in enumerate(self.impls if self.impl.retrieves else []):
            impl.bind(self.cache, geometry._replace(layer=1 + rank, rank=rank))
            self._keep_rows(rank)
        self.on_cpu_selected: list[Selected] = []
        """As :meth:`selected`, of the step that was last asked what is expected."""
        self.cpu_keys = torch.zeros(shape.num_pages * shape.kv_heads, shape.page * shape.dim)
        self.on_cpu = Pipeline(self.config, shape.page, shape.kv_heads)
        places = np.arange(shape.page * shape.dim, dtype=np.int32)
        places = places.reshape(shape.page, shape.dim).T.ravel().copy()
        reader = PageReader(self.cpu_keys, places, (shape.dim, shape.page), "keys")
        self.cpu_layers: list[LayerStages | None] = [
            self.on_cpu.make_layer(geometry._replace(layer=1 + rank, rank=rank), reader)
            for rank in range(layers)
        ]
        self.cpu_layer = self.cpu_layers[0]

    def _keep_rows(self, rank: int) -> None:
        """Notes what a layer selects."""
        stages = self.impls[rank].stages
        assert stages is not None
        select = stages.select

        def selecting(*args: Any) -> PageRows:
            rows = select(*args)
            self.rows[rank] = rows
            return rows

        stages.__dict__["select"] = selecting

    def content(self, request: int) -> Content:
        """Of a request."""
        if request not in self._content:
            self._content[request] = self._made(request)
        return self._content[request]

    def _made(self, request: int) -> Content:
        generator = torch.Generator().manual_seed(self.content_of.get(request, request))
        shape = self.shape

        def made(heads: int) -> torch.Tensor:
            return torch.randn(LONGEST, heads, shape.dim, generator=generator).to(DTYPE)

        return Content(made(shape.kv_heads), made(shape.kv_heads),
                       made(shape.kv_heads * shape.group) * 2)  # fmt: skip

    def slots(self, request: int, start: int, stop: int) -> torch.Tensor:
        """``[n]`` slots of a request's tokens; deals out pages as needed."""
        mine = self.pages.setdefault(request, [])
        while len(mine) * self.shape.page < stop:
            mine.append(self._free.pop())
        positions = torch.arange(start, stop)
        page = self.shape.page
        return torch.tensor(mine)[positions // page] * page + positions % page

    def step(self, pieces: list[Piece]) -> torch.Tensor:
        """Runs every layer over a step; the first one's ``[T, H, D]``."""
        metadata, keys, values = self.enter(pieces)
        outputs = []
        for rank, impl in enumerate(self.impls):
            queries = self.queries(pieces, rank)
            output = torch.full_like(queries, torch.nan)
            impl.forward(None, queries, keys, values, self.cache, metadata, output)
            outputs.append(output)
        return outputs[0]

    def selected(self) -> list[Selected]:
        """Of every layer, what the last step's sparse windows selected."""
        plan = self.metadata.plan if self.metadata is not None else None
        if plan is None or plan.sparse is None:
            return [{} for _ in self.impls]
        return [self._selected(plan.sparse, rows) for rows in self.rows]

    def _selected(self, windows: SparseWindows, rows: PageRows | None) -> Selected:
        """Of one layer."""
        heads, page, found = self.shape.kv_heads, self.shape.page, {}
        assert rows is not None
        table, lengths = (column.cpu() for column in rows)
        for s, first in enumerate(windows.token_start.tolist()):
            pages = []
            for row in range(s * heads, (s + 1) * heads):
                mine = table[row, : -(-int(lengths[row]) // page)].tolist()
                assert len(set(mine)) == len(mine)
                pages.append(set(mine))
            for token in range(int(windows.num_tokens[s])):
                found[first + token] = pages
        return found

    def fill(self, pieces: list[Piece], chunk: int = 10**6) -> None:
        """Brings what is before a step into the cache and the layer's memory; nobody attends.

        Where something watches, the pipeline on CPU is told too.
        """
        for piece in pieces:
            for start in range(0, piece.start, chunk):
                part = Piece(piece.request, start, min(chunk, piece.start - start), True)
                metadata, keys, _ = self.enter([part])
                if self.impl.stages is not None and metadata.plan is not None:
                    self.impl.stages.watch(self.new([part], 2), keys, metadata.plan)
                    self.impl.stages.write(keys, metadata.plan)
                if self.on_cpu.watched:
                    self.on_cpu_too([part])

    def enter(self, pieces: list[Piece]) -> tuple[DeviceMetadata, torch.Tensor, torch.Tensor]:
        """Plans a step and puts its keys and values ``[T, Hk, D]`` into the cache."""
        metadata = self.builder.build(0, self.common(pieces))
        self.metadata = metadata
        return metadata, self.put(pieces), self.new(pieces, 1)

    def put(self, pieces: list[Piece]) -> torch.Tensor:
        """Puts a step's keys and values into the cache; the keys ``[T, Hk, D]``."""
        keys, values = self.new(pieces, 0), self.new(pieces, 1)
        slots = torch.cat([self.slots(p.request, p.start, p.stop) for p in pieces]).to(DEVICE)
        page = self.shape.page
        self.cache[slots // page, :, slots % page] = torch.cat([keys, values], -1)
        rows, slots = self.cpu_keys.view(-1, self.shape.kv_heads, page, self.shape.dim), slots.cpu()
        rows[slots // page, :, slots % page] = keys.float().cpu()
        return keys

    def new(self, pieces: list[Piece], which: int) -> torch.Tensor:
        """``[T, ...]`` keys, values or queries of a step."""
        parts = [self.content(p.request)[which][p.start : p.stop] for p in pieces]
        return torch.cat(parts).to(DEVICE)

    def queries(self, pieces: list[Piece], rank: int) -> torch.Tensor:
        """``[T, H, D]`` of a step in one layer."""
        return self.new(pieces, 2).roll(rank, -1)

    def common(self, pieces: list[Piece]) -> CommonAttentionMetadata:
        """As vLLM's model runner has it, with a padded slot behind the last token."""
        starts = torch.tensor(np.cumsum([0, *(p.tokens for p in pieces)]), dtype=torch.int32)
        ends = torch.tensor([p.stop for p in pieces], dtype=torch.int32)
        slots = torch.cat([self.slots(p.request, p.start, p.stop) for p in pieces])
        return CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE), query_start_loc_cpu=starts,
            seq_lens=ends.to(DEVICE),
            num_reqs=len(pieces), num_actual_tokens=int(starts[-1]),
            max_query_len=max(p.tokens for p in pieces), max_seq_len=int(ends.max()),
            block_table_tensor=self.table(pieces).to(DEVICE),
            slot_mapping=torch.cat([slots, torch.tensor([-1])]).to(DEVICE),
            is_prefilling=torch.tensor([p.prefilling for p in pieces]),
            seq_lens_cpu_upper_bound=ends.clone(),
        )  # fmt: skip

    def table(self, pieces: list[Piece]) -> torch.Tensor:
        """``[B, max_pages]`` int32 block table; page 0 behind a request's pages."""
        rows = [self.pages[p.request] for p in pieces]
        width = max(map(len, rows)) + 2
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)

    def expected(self, pieces: list[Piece]) -> torch.Tensor:
        """``[T, H, D]`` float64 attention to what the pipeline on CPU selects for the step."""
        starts = np.cumsum([0, *(p.tokens for p in pieces)], dtype=np.int32)
        self.on_cpu_selected = self.on_cpu_too(pieces)
        seen = self.on_cpu_selected[0]
        outputs = []
        for row, piece in enumerate(pieces):
            for token in range(piece.tokens):
                mine = seen.get(int(starts[row]) + token)
                outputs.append(self._attend(piece, piece.start + token, mine))
        return torch.stack(outputs)

    def on_cpu_too(self, pieces: list[Piece]) -> list[Selected]:
        """Shows a step, whose keys are in the cache, to the pipeline on CPU; what it selects."""
        starts = np.cumsum([0, *(p.tokens for p in pieces)], dtype=np.int32)
        slots = torch.cat([self.slots(p.request, p.start, p.stop) for p in pieces])
        batch = Batch(
            starts, np.array([p.stop for p in pieces], np.int32),
            np.array([p.prefilling for p in pieces]), self.table(pieces).numpy(), slots.numpy(),
        )  # fmt: skip
        plan = self.on_cpu.plan(batch)
        found: list[Selected] = []
        for rank, layer in enumerate(self.cpu_layers):
            queries, keys = self.queries(pieces, rank).float().cpu(), self.new(pieces, 0).float()
            if plan is not None:
                self.on_cpu.run(layer, queries, keys.cpu(), plan)
            elif layer is not None:
                self.on_cpu.pass_by(layer, queries, keys.cpu())
            table = None if plan is None else plan.table
            found.append({} if table is None else self._pages_of_tokens(table.step, table))
        return found

    def _pages_of_tokens(self, step: Step, table: PageTable) -> Selected:
        """Of every token of a sparse window, the physical pages of each KV head."""
        windows, heads = step.windows, self.shape.kv_heads
        found = {}
        for s in np.flatnonzero(windows.sparse):
            pages = []
            for head in range(heads):
                row = s * heads + head
                filled = -(-int(table.seq_lens[row]) // self.shape.page)
                pages.append({n // heads for n in table.table[row, :filled].tolist()})
            for token in range(windows.num_tokens[s]):
                found[int(windows.token_start[s]) + token] = pages
        return found

    def _attend(self, piece: Piece, position: int, pages: list[set[int]] | None) -> torch.Tensor:
        """``[H, D]`` of one query."""
        part, shape = self.content(piece.request), self.shape
        outputs = []
        for head in range(shape.kv_heads):
            tokens = torch.arange(position + 1)
            if pages is not None:
                mine = torch.tensor(self.pages[piece.request])[tokens // shape.page]
                tokens = tokens[torch.isin(mine, torch.tensor(sorted(pages[head])))]
            heads = slice(head * shape.group, (head + 1) * shape.group)
            query = part.queries[position, heads].double()
            logits = query @ part.keys[tokens, head].double().T * self.impl.scale
            outputs.append(logits.softmax(-1) @ part.values[tokens, head].double())
        return torch.cat(outputs)


def empty_cache(shape: Shape, layout: str) -> torch.Tensor:
    """``[pages, Hk, P, 2 * D]`` of NaN, the second of three layers of a layout."""
    size = (3, shape.num_pages, shape.kv_heads, shape.page, 2 * shape.dim)
    order = KVCacheLayout[layout].stride_order
    memory = torch.full([size[axis] for axis in order], torch.nan, dtype=DTYPE, device=DEVICE)
    return memory.permute([order.index(axis) for axis in range(5)])[1]


def layers_of(
    shape: Shape, config: KvplugConfig, count: int, sliding: Sequence[int | None] = ()
) -> tuple[list[DeviceImpl], DeviceMetadataBuilder, Any]:
    """vLLM's classes for CUDA as vLLM makes them, from a config with no more than they read.

    The first layers have the model's sliding windows, if any are given.
    """
    heads = shape.kv_heads * shape.group
    model = SimpleNamespace(
        get_num_kv_heads=lambda _: shape.kv_heads, get_head_size=lambda: shape.dim,
        get_num_attention_heads=lambda _: heads, rswa_window=None, max_model_len=LONGEST,
    )  # fmt: skip
    layers: dict[str, Any] = {}
    for number in range(count):
        layer = Attention.__new__(Attention)
        torch.nn.Module.__init__(layer)
        layer.num_heads = heads
        layer.impl = DeviceImpl(
            heads, shape.dim, shape.dim**-0.5, shape.kv_heads, None,
            sliding[number] if number < len(sliding) else None, "auto", None, "decoder",
        )  # fmt: skip
        layers[f"layers.{1 + number}.attn"] = layer
    vllm_config: Any = SimpleNamespace(
        model_config=model, parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=6),
        compilation_config=SimpleNamespace(
            cudagraph_mode=None, static_forward_context=layers, max_cudagraph_capture_size=None
        ),
        additional_config={"kvplug": config.model_dump(exclude_none=True)},
    )  # fmt: skip
    spec: Any = SimpleNamespace(
        block_size=shape.page, num_kv_heads=shape.kv_heads, head_size=shape.dim
    )
    builder = DeviceMetadataBuilder(spec, list(layers), vllm_config, DEVICE)
    return [layer.impl for layer in layers.values()], builder, vllm_config
