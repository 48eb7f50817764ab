"""Made-up engine steps: requests whose keys and queries come from a seed, at shuffled pages.

A request is its content: the same name gives the same keys and queries at the same positions,
wherever it lies in the cache and whatever it shares a batch with. Physical page 0 belongs to
nobody and holds poison, and so do the block-table entries behind a request's pages: a row that
names it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from kvplug.config import KvplugConfig
from kvplug.index.base import IndexShape, PageIndex
from kvplug.pipeline import Pipeline, Plan
from tests.cases import PolicyCase

MAX_CONTEXT = 1024
HEAD_DIM = 16


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

    def __post_init__(self) -> None:
        config = KvplugConfig.parse(
            {"policy": self.case.name, "options": self.case.options, **self.options}
        )
        self.pipeline = Pipeline(config, self.page, self.num_kv_heads)
        self.config = config
        shape = IndexShape(self.num_pages, self.num_kv_heads, self.page, HEAD_DIM, 1, 0, 0)
        self.index: PageIndex | None = self.pipeline.make_index(shape)
        dealer = torch.Generator().manual_seed(self.shuffle)
        self._free = (torch.randperm(self.num_pages - 1, generator=dealer) + 1).tolist()
        if self.index is not None:
            poison = torch.full((self.page, self.num_kv_heads, HEAD_DIM), 1e4)
            self.index.write(poison, torch.arange(self.page))

    def slots(self, request: int, start: int, stop: int) -> torch.Tensor:
        """``[stop - start]`` slots of a request's tokens; deals out pages as needed."""
        mine = self.pages_of.setdefault(request, [])
        while len(mine) * self.page < stop:
            mine.append(self._free.pop())
        positions = torch.arange(start, stop)
        return torch.tensor(mine)[positions // self.page] * self.page + positions % self.page

    def write(self, request: int, start: int, stop: int) -> None:
        """Writes a request's keys to the index, as a step that computes them does."""
        slots = self.slots(request, start, stop)
        if self.index is not None:
            keys = content(request, self.num_kv_heads, 1)[start:stop].contiguous()
            self.index.write(keys, slots)

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
            self.write(piece.request, 0 if cached else piece.start, piece.stop)
        return self.pipeline.plan(
            np.cumsum([0, *(piece.tokens for piece in pieces)], dtype=np.int32),
            np.array([piece.stop for piece in pieces], np.int32),
            np.array([piece.prefilling for piece in pieces]),
            self.table(pieces),
        )

    def queries(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """``[T, H, D]`` queries of the step."""
        heads = self.num_kv_heads * self.group
        parts = [content(p.request, heads, 2)[p.start : p.stop] for p in pieces]
        return torch.cat(parts)

    def run(
        self, pieces: Sequence[Piece], *, cached: bool = True
    ) -> dict[tuple[int, int], Attended | None]:
        """Runs one step; what each (request, position) attends to."""
        plan = self.plan(pieces, cached=cached)
        if plan is None:
            return {
                (piece.request, position): None
                for piece in pieces
                for position in range(piece.start, piece.stop)
            }
        self.pipeline.select(self.index, self.queries(pieces), plan)
        return dict(self.read(pieces, plan))

    def rows(self, plan: Plan, window: int) -> list[list[int]]:
        """Per KV head, the filled physical entries of a window's page-table row."""
        found = []
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
