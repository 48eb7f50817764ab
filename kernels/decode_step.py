"""One step of decoding on the device: hash, score, select, write page tables, attend.

The twin on CPU is :class:`kvplug.pipeline.Pipeline` with the recipe
:class:`kvplug.policies.simhash.SimHash`, for windows of one token: every query head of the token is
a probe, a page counts by its token that matches a probe best, and the best pages are attended to
between sinks and local pages. Contexts whose far pages fit the budget, and those that end at or
before ``dense_below``, attend to everything, through the same attention kernel.

Nothing waits for the device and nothing is allocated: regions are found on the device, and all
buffers are made once, for the largest batch and the longest context. So a step can be captured in a
CUDA graph, and replayed with other lengths, tables and slots in the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvplug.kernels.checks import require
from kvplug.kernels.decode_regions import Regions, decode_regions, decode_regions_reference
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.far_pages import FarPages
from kvplug.kernels.hash_scores import hash_scores, hash_scores_reference
from kvplug.kernels.page_rows import Contexts, PageRows
from kvplug.kernels.paged_attention import (
    PagedCache,
    Parts,
    paged_attention,
    paged_attention_reference,
    parts_of,
)
from kvplug.kernels.sign_hash import (
    sign_hash,
    sign_hash_probes,
    sign_hash_probes_reference,
    sign_hash_reference,
)
from kvplug.kernels.top_pages import candidates_shape, top_pages, top_pages_reference


class StepShape(NamedTuple):
    """The largest step, and what its layers have in common."""

    requests: int
    """B, the most."""
    longest: int
    """Tokens of the longest context."""
    heads: int
    """H."""
    kv_heads: int
    """Hk."""
    dim: int
    """D."""


class HashedLayer(NamedTuple):
    """What one layer remembers."""

    planes: torch.Tensor
    """``[Hk, D, 64]`` float32."""
    words: torch.Tensor
    """``[pages, Hk, P]`` int64 sign hashes by slot."""
    cache: PagedCache
    """Keys and values; the decoded tokens' own are written before they are attended to."""
    scale: float
    """Of the logits."""
    cap: float = 0.0
    """Logits become ``cap * tanh(logit / cap)``. 0: they stay."""


class Plan(NamedTuple):
    """One step's views into the buffers; every layer of the step uses the same."""

    contexts: Contexts
    counts: torch.Tensor
    """``[B]`` int32 probes of each request: G, or 0 where everything is attended."""
    probes: torch.Tensor
    """``[B, Hk, G]`` int64."""
    scores: torch.Tensor
    """``[B, Hk, N]`` float32."""
    candidates: torch.Tensor | None
    """See :func:`kvplug.kernels.top_pages.top_pages`."""
    rows: PageRows
    parts: Parts
    """``[n, B, H, D]`` and ``[n, B, H]`` float32; ``n`` does not depend on the batch."""


@dataclass(frozen=True)
class DecodeStep:
    """Buffers of a step, which all layers share, and the kernels over them.

    Make one with :meth:`allocate`. A step is :meth:`plan`, then for each layer :meth:`write` and
    :meth:`attend`; calling the object does all three, for one layer.
    """

    shape: StepShape
    regions: Regions
    begin: torch.Tensor
    """``[B]`` int32 first far pages."""
    end: torch.Tensor
    """``[B]`` int32 pages after the last far ones."""
    counts: torch.Tensor
    """``[B]`` int32 probes."""
    numbers: torch.Tensor
    """``[B]`` int32 0, 1, ...: rows of the block table, and the queries of the windows."""
    ones: torch.Tensor
    """``[B]`` int32 tokens of the windows."""
    probes: torch.Tensor
    """``[B, Hk, G]`` int64."""
    scores: torch.Tensor
    """``[B * Hk * N]`` float32, for far pages of the longest context."""
    candidates: torch.Tensor
    """Int32 scratch of the selection."""
    table: torch.Tensor
    """``[B * Hk, W]`` int32 pages."""
    lengths: torch.Tensor
    """``[B * Hk]`` int32 tokens attended."""
    part_out: torch.Tensor
    """Float32 scratch of the attention."""
    part_lse: torch.Tensor
    """Float32 scratch of the attention."""

    @classmethod
    def allocate(cls, shape: StepShape, regions: Regions, device: torch.device) -> DecodeStep:
        """Makes the buffers.

        Args:
            shape: The largest step.
            regions: Sizes of the contexts' regions.
            device: Where.

        Raises:
            ValueError: Heads are no multiple of KV heads, a size is not positive or not supported.
        """
        regions.check()
        requests, longest, heads, kv_heads, dim = shape
        require(
            min(shape) > 0 and heads % kv_heads == 0,
            f"A step needs positive sizes and heads that are a multiple of KV heads, not {shape}.",
        )
        rows, width = requests * kv_heads, regions.row_pages()
        chunks = _candidates(shape, regions, requests, longest)

        def new(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        table, lengths = new(rows, width), new(rows)
        parts = parts_of(PageRows(table, lengths), regions.page) * requests * heads
        return cls(
            shape, regions, new(requests), new(requests), new(requests),
            torch.arange(requests, dtype=torch.int32, device=device), new(requests) + 1,
            new(requests, kv_heads, heads // kv_heads, dtype=torch.int64),
            new(rows * regions.far_pages(longest), dtype=torch.float32),
            new(_numel(chunks)), table, lengths,
            new(parts * dim, dtype=torch.float32), new(parts, dtype=torch.float32),
        )  # fmt: skip

    def plan(
        self, block_table: torch.Tensor, context_end: torch.Tensor, longest: int | None = None
    ) -> Plan:
        """Finds the regions of a step's contexts, once for all of its layers.

        Args:
            block_table: ``[B, max_pages]`` int32 physical pages; rows may be strided.
            context_end: ``[B]`` int32 tokens of each context, the decoded one included; 0 in an
                unused row, which attends to nothing.
            longest: Tokens that no context of the step exceeds, if fewer than the buffers are made
                for: launches are then smaller. A captured step leaves it out.

        Raises:
            ValueError: The batch or ``longest`` exceeds the buffers, or a tensor is of another
                shape, dtype, layout or device.
        """
        shape, regions, batch = self.shape, self.regions, len(context_end)
        longest = shape.longest if longest is None else longest
        require(
            batch <= shape.requests and longest <= shape.longest,
            f"The buffers hold {shape.requests} requests of {shape.longest} tokens, not {batch} "
            f"of {longest}.",
        )
        group = shape.heads // shape.kv_heads
        begin, end, counts, numbers = (
            column[:batch] for column in (self.begin, self.end, self.counts, self.numbers)
        )
        decode_regions(context_end, regions, group, begin, end, counts)
        rows = batch * shape.kv_heads
        chunks = _candidates(shape, regions, batch, longest)
        parts = (parts_of(PageRows(self.table, self.lengths), regions.page), batch, shape.heads)
        return Plan(
            Contexts(FarPages(block_table, numbers, begin, end), context_end, regions.page),
            counts, self.probes[:batch],
            _part(self.scores, (batch, shape.kv_heads, regions.far_pages(longest))),
            _part(self.candidates, chunks) if chunks else None,
            PageRows(self.table[:rows], self.lengths[:rows]),
            Parts(_part(self.part_out, (*parts, shape.dim)), _part(self.part_lse, parts)),
        )  # fmt: skip

    def write(self, keys: torch.Tensor, slots: torch.Tensor, layer: HashedLayer) -> None:
        """Hashes the decoded tokens' keys.

        Args:
            keys: ``[B, Hk, D]``; see :func:`kvplug.kernels.sign_hash.sign_hash`.
            slots: ``[B]`` int64 where they are written; a negative one is padding.
            layer: The layer, whose words are written.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        sign_hash(keys, slots, layer.planes, layer.words)

    def attend(
        self, queries: torch.Tensor, layer: HashedLayer, plan: Plan, out: torch.Tensor
    ) -> None:
        """Selects pages and attends to them; the row table is this layer's until the next call.

        Args:
            queries: ``[B, H, D]`` bfloat16 or float16, after the rotary embedding.
            layer: The layer.
            plan: Of this step.
            out: ``[B, H, D]`` of the queries' dtype, written; 0 in unused rows.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        kv_heads = self.shape.kv_heads
        vectors = queries.unflatten(1, (kv_heads, -1))  # [B, Hk, G, D]
        sign_hash_probes(vectors, layer.planes, plan.probes)
        hash_scores(layer.words, plan.probes, plan.counts, plan.contexts.far, plan.scores)
        budget = self.regions.budget_pages
        top_pages(plan.scores, budget, plan.contexts, plan.rows, plan.candidates)
        batch = len(plan.counts)
        windows = QueryWindows(queries, self.numbers[:batch], self.ones[:batch])
        paged_attention(
            windows, plan.rows, layer.cache, layer.scale, 1, out, parts=plan.parts, cap=layer.cap
        )  # fmt: skip

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor,
        block_table: torch.Tensor, context_end: torch.Tensor, layer: HashedLayer,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """One layer's step; see :meth:`plan`, :meth:`write` and :meth:`attend`."""
        plan = self.plan(block_table, context_end)
        self.write(keys, slots, layer)
        self.attend(queries, layer, plan, out)


def _candidates(
    shape: StepShape, regions: Regions, requests: int, longest: int
) -> tuple[int, int, int, int] | None:
    """Scratch of the selection for so many requests."""
    pages = regions.far_pages(longest)
    return candidates_shape(requests, shape.kv_heads, pages, regions.budget_pages)


def _numel(shape: tuple[int, ...] | None) -> int:
    """Numbers of a tensor; None has none."""
    return torch.Size(shape).numel() if shape else 0


def _part(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first numbers of a buffer as a contiguous tensor."""
    return buffer[: _numel(shape)].view(shape)


def decode_step_reference(
    queries: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, block_table: torch.Tensor,
    context_end: torch.Tensor, layer: HashedLayer, regions: Regions, out: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :class:`DecodeStep`, strung from the kernels' twins; waits for the device.

    A float64 ``out`` is computed in float64.
    """
    batch, heads, _ = queries.shape
    kv_heads = layer.words.shape[1]
    group = heads // kv_heads
    begin, end, counts = (torch.empty_like(context_end) for _ in range(3))
    decode_regions_reference(context_end, regions, group, begin, end, counts)
    numbers = torch.arange(batch, dtype=torch.int32, device=queries.device)
    far = FarPages(block_table, numbers, begin, end)
    sign_hash_reference(keys, slots, layer.planes, layer.words)
    probes = torch.empty(batch, kv_heads, group, dtype=torch.int64, device=queries.device)
    vectors = queries.unflatten(1, (kv_heads, group))
    sign_hash_probes_reference(vectors, layer.planes, probes)
    pages = max(int((end - begin).max()), 1)
    scores = torch.empty(batch, kv_heads, pages, device=queries.device)
    hash_scores_reference(layer.words, probes, counts, far, scores)
    rows = PageRows(
        torch.zeros(
            batch * kv_heads, regions.row_pages(), dtype=torch.int32, device=queries.device
        ),
        torch.zeros(batch * kv_heads, dtype=torch.int32, device=queries.device),
    )
    contexts = Contexts(far, context_end, regions.page)
    top_pages_reference(scores, regions.budget_pages, contexts, rows)
    windows = QueryWindows(queries, numbers, torch.ones_like(numbers))
    paged_attention_reference(windows, rows, layer.cache, layer.scale, 1, out, cap=layer.cap)
