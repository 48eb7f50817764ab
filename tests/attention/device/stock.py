"""What stands in for vLLM's kernel, which attends to everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from tests.attention.device.world import DEVICE, Shape


class Stock:
    """Stands in for vLLM's kernel, which needs a GPU: attends to everything, in float64.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tokens: list[int] = []
        """Of each call."""

    def __call__(
        self, impl: Any, layer: Any, query: torch.Tensor, key: Any, value: Any,
        kv_cache: torch.Tensor, metadata: Any, output: torch.Tensor, *scales: Any,
    ) -> torch.Tensor:  # fmt: skip
        dim, page = self.shape.dim, self.shape.page
        self.tokens.append(metadata.num_actual_tokens)
        starts = metadata.query_start_loc.tolist()
        assert metadata.max_query_len == max(np.diff(starts))
        assert metadata.max_seq_len == int(metadata.seq_lens.max())
        for row, length in enumerate(metadata.seq_lens.tolist()):
            pages = metadata.block_table[row, : -(-length // page)].long()
            cached = kv_cache[pages].transpose(1, 2).flatten(0, 1)[:length].double()
            keys, values = cached.split(dim, -1)  # [L, Hk, D]
            mine = query[starts[row] : starts[row + 1]].double().unflatten(1, (keys.shape[1], -1))
            logits = torch.einsum("thgd,lhd->thgl", mine, keys) * impl.scale
            positions = torch.arange(length, device=DEVICE)
            unseen = positions > positions[length - len(mine) :, None]
            shares = logits.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
            out = torch.einsum("thgl,lhd->thgd", shares, values).flatten(1, 2)
            output[starts[row] : starts[row + 1]] = out.to(output.dtype)
        return output


def stand_in(monkeypatch: pytest.MonkeyPatch, shape: Shape) -> Stock:
    """Replaces vLLM's kernel."""
    stock = Stock(shape)
    monkeypatch.setattr(
        TritonAttentionImpl, "forward", lambda impl, *args: stock(impl, *args)
    )  # fmt: skip
    return stock
