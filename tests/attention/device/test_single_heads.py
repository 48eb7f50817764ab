"""The view of single heads' pages that FlashAttention and xformers read."""

from __future__ import annotations

import pytest
import torch

from kvplug.attention.attend.single_heads import SingleHeads
from kvplug.attention.attend.triton import cache_of
from tests.attention.device.test_impl import SHAPES
from tests.attention.device.world import DEVICE, empty_cache


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
@pytest.mark.parametrize("name", ["g1", "g3"])
def test_every_page_of_every_head_is_a_page_of_the_view(name: str, layout: str) -> None:
    """In all layouts that vLLM has; g1 has three heads, g3 has one."""
    shape = SHAPES[name]
    kv_cache = empty_cache(shape, layout)
    numbers = torch.arange(kv_cache.numel(), device=DEVICE) % 1999
    kv_cache.copy_(numbers.view(kv_cache.shape))
    cache = cache_of(kv_cache)
    single = SingleHeads.of(cache)
    pages = torch.arange(shape.num_pages, dtype=torch.int32, device=DEVICE)[None, None]
    rows = single.table(pages.expand(1, shape.kv_heads, -1).contiguous())[0]
    assert len(single.keys) == int(rows.max()) + 1  # nothing is behind the last page
    for head in range(shape.kv_heads):
        mine = rows[head].long()
        assert torch.equal(single.keys[mine, :, 0], cache.keys[:, :, head])
        assert torch.equal(single.values[mine, :, 0], cache.values[:, :, head])
