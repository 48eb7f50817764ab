"""Which page gives way by attention mass: LRU-S of InfLLM (Xiao et al. 2024, arXiv 2402.04617).

The authors' code keeps a number for every cached block, which each step takes times 0.1 and adds
the step's attention mass on the block to; the smallest that the step does not attend to gives way.
Here that mass is an estimate, made of what selection knows: the softmax of a window's page scores
over its far pages, for recipes whose scores are on the scale of logits, summed over the windows of
a step. Pages that every window attends to unasked (sinks, local pages, dense contexts) have no
score and count as 1, the most that a far page can have.

So that a step touches only what it attends to, a page keeps the logarithm of its number over
``0.1 ** step``: the order of these is the order of the numbers at any one time.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kvplug.offload.lru import STEP

DECAY_DIGITS = 1.0
"""Powers of ten that mass loses in each step: the authors' ``score_decay`` of 0.1."""


@njit(cache=True)
def weigh_rows(slots, placed, shares, seq_lens, page):  # type: ignore[no-untyped-def]
    """Adds a step's mass to the pages of rows.

    Args:
        slots: The layer's; ``marks[STEP]`` is the step.
        placed: ``[n, width]`` int32 slots.
        shares: ``[n, width]`` float32, at most 1.
        seq_lens: ``[n]`` int32 tokens of each row.
        page: P.
    """
    now = slots.marks[STEP] * DECAY_DIGITS
    for row in range(placed.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            if shares[row, n] > 0:
                slot = placed[row, n]
                one, other = slots.mass[slot], now + np.log10(np.float64(shares[row, n]))
                most, least = max(one, other), min(one, other)
                slots.mass[slot] = most + np.log10(1 + 10 ** (least - most))
