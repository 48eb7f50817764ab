"""Attention in which no key stands further behind a query than one fixed distance, in plain torch.

A query at ``p`` sees a key at ``j <= p`` as if it stood ``min(p - j, d)`` behind it. What is less
than ``d`` behind meets the query as both stand in the cache; everything else meets, at position 0,
the query at position ``d``. That is how InfLLM (Xiao et al. 2024, arXiv 2402.04617), EM-LLM
(Fountas et al. 2024, arXiv 2407.09450) and ReRoPE treat all that has left their local window; a
model that was trained on more than ``d`` positions then meets no distance that it does not know.

One softmax over both kinds of logits, page by page with running maximum and sum (Milakov and
Gimelshein 2018, arXiv 1805.02867), in float32. Where vLLM's own kernel multiplies bfloat16 by AMX,
products are of factors rounded to bfloat16 here too, as a model's own rotated keys are.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvplug.page_reader import PageReader
    from kvplug.page_table import PageTable
    from kvplug.rotary import FixedPositions

QUERIES = 256
"""Query tokens of a window that are attended at a time."""
TOKENS = 2048
"""Keys that are attended at a time."""


class Running(NamedTuple):
    """A softmax under way, of ``n`` queries of each of ``K`` KV heads."""

    peak: torch.Tensor
    """``[K, n, 1]`` largest logit so far."""
    total: torch.Tensor
    """``[K, n, 1]`` sum of exponentials, relative to the peak."""
    output: torch.Tensor
    """``[K, n, D]`` sum of values times those."""

    @classmethod
    def over_nothing(cls, heads: int, rows: int, dim: int) -> Running:
        """Before the first key."""
        peak = torch.full((heads, rows, 1), -torch.inf)
        return cls(peak, torch.zeros(heads, rows, 1), torch.zeros(heads, rows, dim))

    def take_in(self, logits: torch.Tensor, values: torch.Tensor) -> Running:
        """After more keys; ``logits`` are used up.

        Args:
            logits: ``[K, n, L]``, -inf for what a query does not see.
            values: ``[K, L, D]`` finite.
        """
        peak = torch.maximum(self.peak, logits.amax(-1, keepdim=True))
        # A query that has seen nothing yet has no peak: any finite one will do.
        base = peak.where(peak > -torch.inf, 0.0)
        shrink = (self.peak - base).exp_()
        weights = logits.sub_(base).exp_()
        total = self.total * shrink + weights.sum(-1, keepdim=True)
        return Running(peak, total, torch.baddbmm(self.output * shrink, weights, values))


class FixedAttend:
    """Attends windows of a step so, over the page table's rows.

    Args:
        keys: Reads the layer's keys as ``[n, D, P]``, from wherever attention reads.
        values: Reads its values as ``[n, P, D]``.
        positions: The layer's, with its ``d``.
        scale: Of the dot products.
        softcap: Cap of the logits, 0 for none.
        rounds: Whether factors of products are rounded to bfloat16; for CPUs with AMX.
    """

    def __init__(
        self, keys: PageReader, values: PageReader, positions: FixedPositions, scale: float,
        softcap: float, rounds: bool = False,
    ) -> None:  # fmt: skip
        """Holds its arguments."""
        self._keys, self._values = keys.transposed(), values
        self._rotary, self._numbers, self._distance = positions
        self._scale, self._softcap, self._rounds = scale, softcap, rounds

    def __call__(
        self, query: torch.Tensor, output: torch.Tensor, table: PageTable, pages: torch.Tensor,
        windows: Iterable[int], workspace: Workspace,
    ) -> None:  # fmt: skip
        """Writes the output of ``windows``; leaves the others' alone.

        Args:
            query: ``[T, H, D]`` of the step, as the model rotated them.
            output: ``[T, H, D]``, written.
            table: The step's page table, with the layer's pages selected.
            pages: ``[S * Hk, width]`` int32, what is read instead of the table's entries: those, or
                a hot pool's slots.
            windows: Which.
            workspace: Where keys and values are unpacked.
        """
        for s in windows:
            # Rounding is a pass over keys and values, which single queries do not make up for.
            with rounding(self._rounds and int(table.step.windows.num_tokens[s]) > 1):
                self._window(query, output, table, pages, int(s), workspace)

    def warm_up(self) -> None:
        """Compiles what a call needs, by reading the first page."""
        page, workspace = torch.zeros(1, dtype=torch.int64), Workspace()
        keys = self._keys.read(page, workspace)
        self._values.read(page, workspace)
        self._rotary.move(keys.transpose(0, 1).contiguous(), page.expand(keys.shape[1]), 0)

    def _window(
        self, query: torch.Tensor, output: torch.Tensor, table: PageTable, pages: torch.Tensor,
        s: int, workspace: Workspace,
    ) -> None:  # fmt: skip
        """Window ``s`` of a call."""
        heads, found = table.num_kv_heads, table.step.windows
        rows = slice(s * heads, (s + 1) * heads)
        lengths = -(-table.seq_lens[rows] // table.page)
        # Heads of as many pages each are attended together where a window is one token.
        together = int(found.num_tokens[s]) == 1 and bool((lengths == lengths[0]).all())
        step = heads if together else 1
        start, count = int(found.token_start[s]), int(found.num_tokens[s])
        stop = int(found.context_end[s])
        for head in range(0, heads, step):
            filled, first = int(lengths[head]), s * heads + head
            mine = slice(first, first + step)
            entries = table.table[mine, :filled].long()
            positions = self._numbers.positions(entries // heads).flatten(1)
            for i in range(0, count, QUERIES):
                tokens = slice(start + i, start + min(i + QUERIES, count))
                asked = torch.arange(tokens.start, tokens.stop) + (stop - count - start)
                part, into = (
                    each[tokens].unflatten(1, (heads, -1))[:, head : head + step]
                    for each in (query, output)
                )
                into.copy_(
                    self._attend(part, asked, pages[mine, :filled].long(), positions, workspace)
                )

    def _attend(
        self, query: torch.Tensor, asked: torch.Tensor, pages: torch.Tensor,
        positions: torch.Tensor, workspace: Workspace,
    ) -> torch.Tensor:  # fmt: skip
        """``[m, K, G, D]`` float32, of queries of a window.

        Args:
            query: ``[m, K, G, D]``.
            asked: ``[m]`` their positions.
            pages: ``[K, N]`` int64, what is read.
            positions: ``[K, N * P]`` of its tokens, ascending; in the last page, some may be behind
                the context.
            workspace: Where keys and values are unpacked.
        """
        count, heads, group, dim = query.shape
        near = query.float().contiguous()
        far = near.clone()
        self._rotary.move(far.flatten(1, 2), asked, self._distance)
        near, far = (q.permute(1, 0, 2, 3).flatten(1, 2) for q in (near, far))  # [K, m * G, D]
        asked = asked.repeat_interleave(group)[:, None]
        page = positions.shape[1] // pages.shape[1]
        # Pages that are far from every query need no look at what is near.
        last = positions[:, page - 1 :: page]
        mixed = int((last <= asked[0] - self._distance).all(0).long().cumprod(0).sum())
        running = Running.over_nothing(heads, count * group, dim)
        for begin, end in _blocks(mixed, pages.shape[1], max(TOKENS // page, 1)):
            at = positions[:, begin * page : end * page]
            block, shape = pages[:, begin:end].flatten(), (heads, -1, dim)
            keys = self._keys.read(block, workspace).view(shape)
            values = self._values.read(block, workspace).view(shape)
            if end > mixed:
                # What a page's unwritten end held before may be no number, and counts 0 times.
                behind = (at[:, -page:] > asked[-1])[:, :, None]
                keys[:, -page:].masked_fill_(behind, 0)
                values[:, -page:].masked_fill_(behind, 0)
            logits = self._logits(near, far, keys, at, asked, end > mixed)
            running = running.take_in(logits, values)
        found = running.output / running.total
        return found.unflatten(1, (count, group)).transpose(0, 1)

    def _logits(
        self, near: torch.Tensor, far: torch.Tensor, keys: torch.Tensor, at: torch.Tensor,
        asked: torch.Tensor, is_mixed: bool,
    ) -> torch.Tensor:  # fmt: skip
        """``[K, n, L]`` logits; -inf behind a query.

        Args:
            near: ``[K, n, D]`` queries where they stand.
            far: ``[K, n, D]`` the same at ``d``.
            keys: ``[K, L, D]``, which are moved to 0.
            at: ``[K, L]`` positions of the keys.
            asked: ``[n, 1]`` of the queries.
            is_mixed: Whether any key is less than ``d`` behind a query.
        """
        products = torch.bmm(near, keys.mT) if is_mixed else None
        self._rotary.move(keys.view(-1, 1, keys.shape[2]), at.flatten(), 0)
        logits, at = torch.bmm(far, keys.mT), at[:, None]
        if products is not None:
            logits = products.lerp_(logits, (at <= asked - self._distance).float())
        logits *= self._scale
        if self._softcap:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if products is not None:
            logits.masked_fill_(at > asked, -torch.inf)
        return logits


@contextmanager
def rounding(on: bool) -> Iterator[None]:
    """While it lasts, products of float32 matrices may round their factors to bfloat16."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    if on:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _blocks(mixed: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Runs of at most ``size`` pages, none of which has pages on both sides of ``mixed``."""
    starts = [*range(0, mixed, size), *range(mixed, stop, size)]
    return list(zip(starts, [*starts[1:], stop], strict=True))
