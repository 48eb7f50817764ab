"""Caches prefixes in whole, finished windows, and ends hits at whole windows.

A hit that ends inside a window would leave a part of it to be probed with other queries than the
whole one. And pages of a prompt's partial last window were probed as such, and must not become the
beginning of another request's whole one.

Some recipes complete what they store for a page from later queries, up to the size of the local
region (InfLLM's accumulated attention, say). Such a page belongs to the text up to where it is
finished: it is cached once its request has come that far, under the hash of all of that text. To
end hits that much earlier would not do: vLLM's cache may hold a page twice and put together a
prefix of pages of several requests, some of which went on in another way right behind the page, or
were preempted before it was finished.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.patches.record import Patch

WINDOW = "kvplug_window"
"""Attribute of a cache manager and its coordinator that serve kvplug: tokens of a window."""
MARGIN = "kvplug_margin"
"""Another: tokens, in whole windows, behind a page by which it is finished."""


class Ahead:
    """A request whose blocks have the hashes of blocks that come later.

    Args:
        request: vLLM's.
        blocks: How much later.
    """

    def __init__(self, request: Any, blocks: int) -> None:
        """Holds its arguments."""
        self._request, self._blocks = request, blocks

    def __getattr__(self, name: str) -> Any:
        """Everything else is the request's."""
        return getattr(self._request, name)

    @property
    def block_hashes(self) -> Any:
        """Hash of each block: of the text up to the end of the later one."""
        return self._request.block_hashes[self._blocks :]


def _ahead(request: Any, margin: int, block_pool: Any) -> Any:
    """The request as its pages are cached and found."""
    return Ahead(request, margin // block_pool.hash_block_size) if margin else request


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_computed_blocks(self: Any, request: Any) -> tuple[Any, int, int]:
        window = getattr(self, WINDOW, None)
        if window is not None:
            request = _ahead(request, getattr(self, MARGIN), self.block_pool)
        blocks, tokens, boundary = original(self, request)
        if window is None or not tokens:
            return blocks, tokens, boundary
        wanted = tokens // window * window
        while tokens > wanted:
            # Looked up again and not cut: groups with a sliding window keep other blocks for a
            # shorter hit, and may make it shorter still.
            found, tokens, _ = self.coordinator.find_longest_cache_hit(request.block_hashes, wanted)
            blocks, boundary = self.create_kv_cache_blocks(found), 0
            wanted = tokens // window * window
        return blocks, tokens, boundary

    return get_computed_blocks


def _wrap_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cache_blocks(self: Any, request: Any, num_computed_tokens: int) -> None:
        window = getattr(self, WINDOW, None)
        if window is not None:
            margin = getattr(self, MARGIN)
            num_computed_tokens = max(num_computed_tokens - margin, 0) // window * window
            request = _ahead(request, margin, self.block_pool)
        original(self, request, num_computed_tokens)

    return cache_blocks


PATCHES = [
    Patch(
        target="vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        vllm=">=0.32,<0.33",
        why="Pages of a partial window would be shared as the beginning of a whole one, which was "
        "probed with other queries; and a recipe that learns from later queries would share "
        "unfinished pages.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="An attention backend can say in what units, and when, a prefix may be cached.",
        fingerprint="8a801b2adf06ab1a",
        wrap=_wrap_cache,
    ),
    Patch(
        target="vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        vllm=">=0.32,<0.33",
        why="A window entered half way would be probed with other queries: a request would get "
        "another answer on a prefix hit than cold.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="An attention backend can say how much of a cached prefix it can reuse.",
        fingerprint="77f434d88d573bfe",
        wrap=_wrap,
    ),
]
