"""Attention in which no key stands further behind a query than one fixed distance, in plain torch.

A query at ``p`` sees a key at ``j <= p`` as if it stood ``min(p - j, d)`` behind it. What is less
than ``d`` behind meets the query as both stand in the cache; everything else meets, at position 0,
the query at position ``d``. That is how InfLLM (Xiao et al. 2024, arXiv 2402.04617), EM-LLM
(Fountas et al. 2024, arXiv 2407.09450) and ReRoPE treat all that has left their local window; a
model that was trained on more than ``d`` positions then meets no distance that it does not know.

One softmax over both kinds of logits, page by page with running maximum and sum (Milakov and
Gimelshein 2018, arXiv 1805.02867), in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvplug.page_reader import PageReader
    from kvplug.page_table import PageTable
    from kvplug.rotary import FixedPositions
    from kvplug.workspace import Workspace

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
    """

    def __init__(
        self, keys: PageReader, values: PageReader, positions: FixedPositions, scale: float,
        softcap: float,
    ) -> None:  # fmt: skip
        """Holds its arguments."""
        self._keys, self._values = keys.transposed(), values
        self._rotary, self._numbers, self._distance = positions
        self._scale, self._softcap = scale, softcap

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
        heads, found = table.num_kv_heads, table.step.windows
        for s in windows:
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
                    asked = torch.arange(i, min(i + QUERIES, count))
                    part = query[start + asked].unflatten(1, (heads, -1))[:, head : head + step]
                    attended = self._attend(
                        part, asked + stop - count, pages[mine, :filled].long(), positions,
                        workspace,
                    )  # fmt: skip
                    whole = output[start : start + count].unflatten(1, (heads, -1))
                    whole[asked, head : head + step] = attended.to(output.dtype)

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
        near = query.float()
        turn = self._rotary.turn(asked[:, None, None], torch.tensor(self._distance))
        far = self._rotary.apply(near.clone(), turn)
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
            # What a page's unwritten end held before may be no number, and counts 0 times.
            values.masked_fill_((at > asked[-1])[:, :, None], 0)
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
        keys = self._rotary.apply(keys, self._rotary.turn(at, torch.tensor(0)))
        logits, at = torch.bmm(far, keys.mT), at[:, None]
        if products is not None:
            logits = logits.where(at <= asked - self._distance, products)
        logits *= self._scale
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits.masked_fill_(at > asked, -torch.inf) if products is not None else logits


def _blocks(mixed: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Runs of at most ``size`` pages, none of which has pages on both sides of ``mixed``."""
    starts = [*range(0, mixed, size), *range(mixed, stop, size)]
    return list(zip(starts, [*starts[1:], stop], strict=True))
