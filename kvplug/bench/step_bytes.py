"""Bytes that a decode attention step cannot do without, which bound its time from below."""

from __future__ import annotations

from typing import NamedTuple

HASH_BYTES = 8
"""Of a token and KV head."""


class StepSize(NamedTuple):
    """One step of decoding, of one layer."""

    batch: int
    """B, requests."""
    context: int
    """Tokens of each."""
    budget: int
    """Far tokens per request and KV head."""
    heads: int = 32
    """H."""
    kv_heads: int = 8
    """Hk."""
    dim: int = 128
    """D."""
    page: int = 32
    """P."""
    item: int = 2
    """Bytes of a number of keys and values."""
    sink: int = 64
    local: int = 512
    dense_below: int = 4096

    @property
    def sink_pages(self) -> int:
        """Pages that are always attended."""
        return -(-self.sink // self.page)

    @property
    def pages(self) -> int:
        """Pages of a context."""
        return -(-self.context // self.page)

    @property
    def far_pages(self) -> int:
        """Far pages of a request; 0 where everything is attended."""
        far = max(self.context - self.local, 0) // self.page - self.sink_pages
        retrieves = far > self.budget // self.page and self.context > self.dense_below
        return far if retrieves else 0

    @property
    def attended(self) -> int:
        """Tokens that a request attends to per KV head."""
        unread = self.far_pages - self.budget // self.page if self.far_pages else 0
        return self.context - unread * self.page

    @property
    def hash_bytes(self) -> int:
        """Sign hashes of all far tokens."""
        return self.batch * self.kv_heads * self.far_pages * self.page * HASH_BYTES

    @property
    def kv_bytes(self) -> int:
        """Keys and values that are attended."""
        return self._kv(self.attended)

    @property
    def floor_bytes(self) -> int:
        """Hashes, and keys and values that are attended."""
        return self.hash_bytes + self.kv_bytes

    @property
    def dense_bytes(self) -> int:
        """All keys and values."""
        return self._kv(self.context)

    @property
    def memory_bytes(self) -> int:
        """What must fit the device: the whole cache, in whole pages, and hashes of it."""
        tokens = self.pages * self.page
        return self._kv(tokens) + self.batch * self.kv_heads * tokens * HASH_BYTES

    def _kv(self, tokens: int) -> int:
        return self.batch * tokens * self.kv_heads * self.dim * 2 * self.item
