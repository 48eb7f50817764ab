"""Plans of steps of decoded tokens, for CUDA graphs: in memory that stays where it is.

A graph replays kernels with the pointers, sizes and grids of the step that was captured. So every
token is a window that selects pages, also one whose context attends to everything: it has no far
pages, and all of its pages count as local. There are as many windows as rows in the batch, those
that vLLM pads it with attend to nothing, and any context may be as long as the longest.
"""

from __future__ import annotations

import numpy as np
import torch

from kvplug.attention.device.plan import (
    DevicePlan,
    Lengths,
    SparseWindows,
    find_first_tokens,
    first_pages_of,
    room_for,
)
from kvplug.attention.device.send import send
from kvplug.pages import PageGeometry
from kvplug.windows import Ints, cut_windows


class DecodePlans:
    """Plans steps in which every request decodes one token.

    Args:
        requests: Of a step, at most.
        longest: Tokens of the longest context.
        device: Where.
    """

    def __init__(self, requests: int, longest: int, device: torch.device) -> None:
        """Allocates."""
        self.longest, requests = longest, room_for(requests)  # columns begin at 16 bytes
        self.columns = torch.zeros((4, requests), dtype=torch.int32, device=device)
        """What differs from step to step: :attr:`DevicePlan.firsts`, then where regions lie."""
        self.numbers = torch.arange(requests, dtype=torch.int32, device=device)
        self.ones = torch.ones_like(self.numbers)

    @staticmethod
    def serves(lengths: Lengths) -> bool:
        """Whether a step is of decoded tokens alone, or looks so to what picks a graph."""
        tokens = int(lengths.query_start[-1])
        return np.array_equal(lengths.query_start[: tokens + 1], np.arange(tokens + 1))

    def plan(
        self, lengths: Lengths, block_table: torch.Tensor, slots: torch.Tensor,
        geometry: PageGeometry, first_tokens: int,
    ) -> tuple[DevicePlan, Ints]:  # fmt: skip
        """Plans a step; the plan before it no longer holds.

        :attr:`DevicePlan.begun` is empty: what is learnt from contexts that begin is learnt before
        the next step, for it takes kernels that only these steps need. No window retrieves pages of
        a context as short as that.

        Args:
            lengths: Of the batch, on the host; requests of no tokens are padding.
            block_table: ``[B, max_pages]`` int32 on the device.
            slots: ``[B]`` int64 on the device, or more.
            geometry: Region sizes.
            first_tokens: Tokens at a context's start that are learnt from when all are there.

        Returns:
            The plan, and the rows ``[m]`` of the contexts that begin, on the host.
        """
        batch = len(lengths.seq_lens)
        windows = cut_windows(*lengths, geometry)
        rows, begun = find_first_tokens(lengths, first_tokens)
        columns = np.zeros(self.columns.shape, np.int32)
        columns[0] = -1
        columns[0, : len(rows)] = rows
        columns[1:, windows.request] = windows.context_end, windows.far_begin, windows.far_end
        sent = send(columns, self.columns.device)
        sent[0, :batch] = first_pages_of(sent[0, :batch], block_table)
        self.columns.copy_(sent)
        firsts, *regions = self.columns[:, :batch]
        numbers, most_far = self.numbers[:batch], room_for(self.longest // geometry.page)
        sparse = SparseWindows(
            batch, most_far, geometry.budget_pages, numbers[:0], self.numbers[:1], numbers, numbers,
            self.ones[:batch], *regions,
        )  # fmt: skip
        plan = DevicePlan(block_table, slots[:batch], windows, firsts, numbers[:0], sparse, None)
        return plan, begun
