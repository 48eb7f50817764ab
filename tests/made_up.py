"""Made-up engine steps: requests whose keys and queries come from a seed, at shuffled pages.

A request is its content: the same name gives the same keys and queries at the same positions,
wherever it lies in the cache and whatever it shares a batch with. Physical page 0 belongs to
nobody and holds poison, and so do the block-table entries behind a request's pages: a row that
names it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from kvplug.config import KvplugConfig
from kvplug.layer_stages import LayerStages
from kvplug.page_reader import PageReader
from kvplug.pipeline import Pipeline, Plan
from kvplug.rotary import Rotary
from kvplug.row_counts import RowCounts
from kvplug.stage import Layer, LayerShape
from kvplug.windows import Asked, Batch
from tests.cases import PolicyCase

MAX_CONTEXT = 1024
HEAD_DIM = 16
VOCABULARY = 11


class Piece(NamedTuple):
    """What one request brings to one step."""

    request: int
    """The request's name: the seed of its content."""
    start: int
    """Context before the step."""
    tokens: int
    """Query tokens in the step."""
    prefilling: bool

    @property
    def stop(self) -> int:
        return self.start + self.tokens


class Attended(NamedTuple):
    """What the queries of one window attend to; None instead of it is everything."""

    first: int
    """Absolute position of the window's first query."""
    end: int
    """Context of the window's last query."""
    pages: tuple[tuple[int, ...], ...]
    """Per KV head, logical pages in the row's order."""


def content(request: int, heads: int, salt: int) -> torch.Tensor:
    """``[MAX_CONTEXT, heads, HEAD_DIM]`` floats; queries and keys differ by ``salt``."""
    generator = torch.Generator().manual_seed(request * 97 + salt)
    return torch.randn(MAX_CONTEXT, heads, HEAD_DIM, generator=generator)


def layer_shape(**changed: Any) -> LayerShape:
    """A small layer's geometry, with whatever a test needs changed."""
    shape = LayerShape(
        num_pages=40, num_kv_heads=3, page=8, head_dim=HEAD_DIM, layer=1, first_kv_head=0, seed=0,
        num_heads=6, num_layers=1, rank=0, window=16, local=20, scale=0.25, softcap=0.0,
        dense_below=0,
    )  # fmt: skip
    shape = shape._replace(**changed)
    if "num_heads" not in changed:
        shape = shape._replace(num_heads=2 * shape.num_kv_heads)
    return shape


def quarter_turns() -> Rotary:
    """A rotary embedding without rounding: pair ``i`` turns by ``i`` quarters a token."""
    quarters = torch.arange(MAX_CONTEXT)[:, None] * torch.arange(HEAD_DIM // 2)
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])
    return Rotary(torch.cat([cos[quarters % 4], cos[(quarters + 3) % 4]], 1), True)


def reader_of(cache: torch.Tensor) -> PageReader:
    """Reads ``[pages * Hk, 1, P, D]`` keys that lie as vLLM's ``vec`` kernel packs them."""
    _, _, page, dim = cache.shape
    transposed = np.arange(page * dim, dtype=np.int32)
    return PageReader(cache.flatten(1), transposed, (dim, page), "keys")


def layer_of(cache: torch.Tensor | None = None, **changed: Any) -> Layer:
    """A layer by itself, for tests of one stage."""
    return Layer(layer_shape(**changed), {}, None if cache is None else reader_of(cache))


class Oracle:
    """A model whose logits follow from its hidden states; every few tokens it is taken aback."""

    @staticmethod
    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        """``[n, V]`` from ``[n, hidden_size]``."""
        return hidden[:, :VOCABULARY] ** 3


@dataclass
class World:
    """A pipeline, one layer's index, and a cache whose pages are dealt out at random."""

    case: PolicyCase
    options: dict[str, Any]
    page: int = 8
    num_kv_heads: int = 3
    group: int = 2
    num_pages: int = 600
    shuffle: int = 0
    """Seed of the order in which pages are dealt."""
    pages_of: dict[int, list[int]] = field(default_factory=dict)
    """Physical pages of each request."""
    asked: dict[int, int] = field(default_factory=dict)
    """Far pages of requests that ask for a budget of their own."""
    targets: dict[int, float] = field(default_factory=dict)
    """Recall targets of requests that ask for their own."""
    counts: RowCounts | None = None
    """Takes what each row of the next step attends to."""
    _forked: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = KvplugConfig.parse(
            {"policy": self.case.name, "options": self.case.options, **self.options}
        )
        self.pipeline = Pipeline(config, self.page, self.num_kv_heads)
        self.config = config
        shape = layer_shape(
            num_pages=self.num_pages, num_kv_heads=self.num_kv_heads, page=self.page,
            num_heads=self.num_kv_heads * self.group, window=config.window, local=config.local,
            dense_below=config.dense_below,
        )  # fmt: skip
        self.cache = torch.zeros(self.num_pages * self.num_kv_heads, 1, self.page, HEAD_DIM)
        fixed = None
        if config.positions == "fixed":
            fixed = self.pipeline.fix(quarter_turns(), self.num_pages)
        reader = reader_of(self.cache)
        self.layer: LayerStages | None = self.pipeline.make_layer(shape, reader, fixed)
        dealer = torch.Generator().manual_seed(self.shuffle)
        self._free = (torch.randperm(self.num_pages - 1, generator=dealer) + 1).tolist()
        poison = torch.full((self.page, self.num_kv_heads, HEAD_DIM), 1e4)
        self._store(poison, torch.arange(self.page))

    def _store(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Puts keys ``[T, Hk, D]`` into the cache; their pages are not summarised any more."""
        self._pack(keys, slots)
        if self.pipeline.seals is not None:
            self.pipeline.seals.reset(slots.numpy(), self.page)

    def _pack(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Puts keys into the cache as vLLM's kernel packs them."""
        packed = self.cache.view(self.num_pages, self.num_kv_heads, HEAD_DIM, self.page)
        packed[slots // self.page, :, :, slots % self.page] = keys

    def slots(self, request: int, start: int, stop: int) -> torch.Tensor:
        """``[stop - start]`` slots of a request's tokens; deals out pages as needed."""
        mine = self.pages_of.setdefault(request, [])
        while len(mine) * self.page < stop:
            mine.append(self._free.pop())
        positions = torch.arange(start, stop)
        return (
            torch.tensor(mine, dtype=torch.int64)[positions // self.page] * self.page
            + positions % self.page
        )

    def write(self, request: int, start: int, stop: int) -> None:
        """Writes a request's keys, as a step that computes them does."""
        slots = self.slots(request, start, stop)
        self._store(self.keys(request)[start:stop].contiguous(), slots)

    def keys(self, request: int) -> torch.Tensor:
        """``[MAX_CONTEXT, Hk, D]`` keys of a request."""
        return self._content(request, self.num_kv_heads, 1)

    @contextmanager
    def keys_differ_from(self, request: int, position: int) -> Iterator[None]:
        """While it lasts, the request's content from ``position`` on is another's."""
        self._forked[request] = position
        yield
        del self._forked[request]

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        mine = content(request, heads, salt)
        fork = self._forked.get(request, MAX_CONTEXT)
        return torch.cat([mine[:fork], content(request + 50, heads, salt)[fork:]])

    def prefill(self, request: int, stop: int, limit: int | None = None) -> None:
        """Brings a request's first tokens into the cache, as earlier steps did."""
        limit = limit or self.chunk_limit or max(stop, 1)
        for start in range(0, stop, limit):
            self.run([Piece(request, start, min(limit, stop - start), True)], cached=False)

    @property
    def learns(self) -> bool:
        """Whether what the recipe knows of a context depends on the steps that computed it."""
        return self.pipeline.watched or self.pipeline.stages.budget.audits

    @property
    def chunk_limit(self) -> int | None:
        """Most prompt tokens of a step, where the recipe has a limit."""
        segment = self.pipeline.stages.segment
        return segment.chunk_limit(self.config.local, self.config.window) if segment else None

    def table(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """``[B, max_pages]`` block table, padded with the poisoned page."""
        rows = [self.pages_of[piece.request] for piece in pieces]
        width = max(map(len, rows)) + 2
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)

    def plan(self, pieces: Sequence[Piece], *, cached: bool = True) -> Plan | None:
        """Writes the step's keys and plans it.

        Args:
            pieces: The batch.
            cached: Also write the context before the step; a test that runs a request's steps
                one after the other has it already.
        """
        for piece in pieces:
            if cached and self.learns:
                self.prefill(piece.request, piece.start)
            elif cached:
                self.write(piece.request, 0, piece.start)
        slots = torch.cat([self.slots(p.request, p.start, p.stop) for p in pieces])
        batch = Batch(
            np.cumsum([0, *(piece.tokens for piece in pieces)], dtype=np.int32),
            np.array([piece.stop for piece in pieces], np.int32),
            np.array([piece.prefilling for piece in pieces]),
            self.table(pieces).numpy(),
            slots.numpy(),
            self.wishes(pieces),
            self.counts,
        )
        plan = self.pipeline.plan(batch)
        self._pack(self.new_keys(pieces), slots)
        return plan

    def wishes(self, pieces: Sequence[Piece]) -> Asked | None:
        """What requests ask for themselves."""
        if not self.asked and not self.targets:
            return None
        pages = self.pipeline.geometry.budget_pages
        return Asked(
            np.array([self.asked.get(piece.request, pages) for piece in pieces], np.int32),
            np.array([self.targets.get(piece.request, np.nan) for piece in pieces]),
        )

    def new_keys(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """``[T, Hk, D]`` keys of the step."""
        return torch.cat([self.keys(p.request)[p.start : p.stop] for p in pieces])

    def queries(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """``[T, H, D]`` queries of the step."""
        heads = self.num_kv_heads * self.group
        parts = [self._content(p.request, heads, 2)[p.start : p.stop] for p in pieces]
        return torch.cat(parts)

    def run(
        self, pieces: Sequence[Piece], *, cached: bool = True
    ) -> dict[tuple[int, int], Attended | None]:
        """Runs one step; what each (request, position) attends to."""
        plan = self.plan(pieces, cached=cached)
        if plan is not None:
            self.attend(pieces, plan)
            self.learn(pieces, plan)
        elif self.layer is not None:
            self.pipeline.pass_by(self.layer, self.queries(pieces), self.new_keys(pieces))
        if plan is None or plan.table is None:
            return {
                (piece.request, position): None
                for piece in pieces
                for position in range(piece.start, piece.stop)
            }
        return dict(self.read(pieces, plan))

    def attend(self, pieces: Sequence[Piece], plan: Plan, sign: float = 1.0) -> None:
        """Runs the layer over the step, with its queries times ``sign``."""
        self.pipeline.run(self.layer, sign * self.queries(pieces), self.new_keys(pieces), plan)

    def learn(self, pieces: Sequence[Piece], plan: Plan) -> None:
        """Shows the model's output to a recipe that learns from it."""
        if self.pipeline.segmenter is None:
            return
        shown = [self._content(p.request, 1, 3)[p.start : p.stop, 0] for p in pieces]
        hidden = torch.cat(shown)
        tokens = (hidden.abs().sum(1) * 1000).long() % VOCABULARY
        self.pipeline.learn(hidden, tokens, Oracle(), plan.step)

    def rows(self, plan: Plan, window: int) -> list[list[int]]:
        """Per KV head, the filled physical entries of a window's page-table row."""
        found = []
        assert plan.table is not None
        for head in range(self.num_kv_heads):
            row = window * self.num_kv_heads + head
            filled = -(-int(plan.table.seq_lens[row]) // self.page)
            found.append(plan.table.table[row, :filled].tolist())
        return found

    def logical(self, request: int, head: int, entries: Sequence[int]) -> tuple[int, ...]:
        """Logical pages of a row's entries; -1 for what is not the request's or the head's."""
        number = {
            physical * self.num_kv_heads + head: n
            for n, physical in enumerate(self.pages_of[request])
        }
        return tuple(number.get(entry, -1) for entry in entries)

    def read(
        self, pieces: Sequence[Piece], plan: Plan
    ) -> Iterator[tuple[tuple[int, int], Attended | None]]:
        """Reads what each (request, position) attends to from the plan's page table."""
        windows = plan.step.windows
        starts = np.cumsum([0, *(piece.tokens for piece in pieces)])
        for s in range(len(windows)):
            piece = pieces[windows.request[s]]
            first = piece.start + int(windows.token_start[s] - starts[windows.request[s]])
            tokens = int(windows.num_tokens[s])
            attended = None
            if windows.sparse[s]:
                pages = tuple(
                    self.logical(piece.request, head, entries)
                    for head, entries in enumerate(self.rows(plan, s))
                )
                attended = Attended(first, int(windows.context_end[s]), pages)
            for position in range(first, first + tokens):
                yield (piece.request, position), attended
