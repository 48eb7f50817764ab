"""Ends prefix hits before pages that the cached prefix had not finished.

Some recipes complete what they store for a page from later queries, up to the size of the local
region (InfLLM's accumulated attention, say). The last pages of a cached prefix then depend on how
the request that left them went on; a hit must end before them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.patches.record import Patch

MARGIN = "kvplug_margin"
"""Attribute of a cache manager that serves such a recipe: tokens, in whole windows."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_computed_blocks(self: Any, request: Any) -> tuple[Any, int, int]:
        blocks, tokens, boundary = original(self, request)
        margin = getattr(self, MARGIN, 0)
        if not margin or not tokens:
            return blocks, tokens, boundary
        # Looked up again and not cut: groups with a sliding window keep other blocks for a
        # shorter hit.
        found, tokens, _ = self.coordinator.find_longest_cache_hit(
            request.block_hashes, max(tokens - margin, 0)
        )
        return self.create_kv_cache_blocks(found), tokens, 0

    return get_computed_blocks


PATCHES = [
    Patch(
        target="vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        vllm=">=0.32,<0.33",
        why="A recipe that learns from later queries would share unfinished pages, and a request "
        "would get another answer on a prefix hit than cold.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="An attention backend can say how much of a cached prefix it can reuse.",
        fingerprint="77f434d88d573bfe",
        wrap=_wrap,
    )
]
