"""What passes through a layer: queries where they lie say what converted ones say."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from numba import njit

from kvplug.numeric import number
from kvplug.stage import Passage
from kvplug.step import Step
from kvplug.workspace import Workspace

TOKENS, HEADS, DIM = 7, 6, 24


@njit
def _numbers(memory, apart, out):
    tokens, heads, dim = out.shape
    for t in range(tokens):
        for h in range(heads):
            for d in range(dim):
                out[t, h, d] = number(memory[t * apart + h * dim + d])


def queries_of(layout: str, dtype: torch.dtype) -> torch.Tensor:
    """``[T, H, D]``, some of them NaN or infinite."""
    wide = torch.randn(TOKENS, 2 * HEADS * DIM).to(dtype)
    wide[2, 5], wide[3, 6] = torch.nan, torch.inf
    if layout == "beside keys":
        return wide[:, : HEADS * DIM].view(TOKENS, HEADS, DIM)
    if layout == "heads apart":
        return wide.view(TOKENS, HEADS, 2 * DIM)[:, :, :DIM]
    return wide[:, : HEADS * DIM].reshape(TOKENS, HEADS, DIM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["alone", "beside keys", "heads apart"])
def test_query_memory(layout: str, dtype: torch.dtype) -> None:
    """To the bit, the last token's last number included."""
    queries = queries_of(layout, dtype)
    passage = Passage(queries, queries, cast("Step", None), Workspace())
    memory, apart = passage.query_memory()
    found = np.full((TOKENS, HEADS, DIM), 7, np.float32)
    _numbers(memory, apart, found)
    assert np.array_equal(found, queries.float().numpy(), equal_nan=True)
    converts = dtype != torch.bfloat16 or layout == "heads apart"
    assert memory.dtype == (np.float32 if converts else np.uint16)
