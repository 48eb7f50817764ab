"""Shapes that kernels are tried at, and random inputs of a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.far_pages import FarPages

Outputs = Sequence[torch.Tensor]


class Shape(NamedTuple):
    """Sizes that kernels are called with."""

    batch: int
    """B, requests."""
    tokens: int
    """Of each context."""
    heads: int
    """H."""
    kv_heads: int
    """Hk."""
    dim: int
    """D."""
    page: int
    """P."""
    dtype: torch.dtype
    window: int = 256
    """Tokens of a window of a prompt."""
    chunk: int = 8192
    """Most tokens of a prompt in one step."""
    sink: int = 64
    local: int = 512
    budget: int = 2048
    """Far tokens per window and KV head."""

    @property
    def pages(self) -> int:
        """N, pages of a context."""
        return -(-self.tokens // self.page)

    @property
    def group(self) -> int:
        """G."""
        return self.heads // self.kv_heads


class Case(NamedTuple):
    """One kernel on one set of inputs."""

    name: str
    kernel: Callable[..., None]
    twin: Callable[..., None]
    call: Callable[[Callable[..., None], Outputs], None]
    """Calls one of the two with the inputs and these outputs."""
    outputs: Outputs
    """As they are before the call."""
    moved: int
    """Bytes that must be read and written, each once."""
    is_exact: bool = True
    """Whether kernel and twin agree to the bit; else in float64 the twin is what both come near."""


class World:
    """Random keys, queries and tables of a shape, made when they are first asked for.

    Args:
        shape: Sizes.
        device: Where they lie.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        """Seeds the generator: every world of a shape and device holds the same."""
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(sum(map(ord, repr(shape[:6]))))

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gaussian numbers."""
        made = torch.empty(size, dtype=dtype, device=self.device)
        return made.normal_(generator=self.generator)

    def whole(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Whole numbers from -8 to 8."""
        options = {"generator": self.generator, "device": self.device}
        return torch.randint(-8, 9, size, **options).to(dtype)

    def words(self, *size: int) -> torch.Tensor:
        """64 random bits each."""
        options = {"generator": self.generator, "device": self.device}
        return torch.randint(-(2**63), 2**63 - 1, size, dtype=torch.int64, **options)

    def column(self, values: Sequence[int] | range) -> torch.Tensor:
        """Int32 numbers."""
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def scratch(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """New memory full of what no kernel should take for a number."""
        made = torch.empty(size, dtype=dtype, device=self.device)
        return made.fill_(torch.nan) if dtype.is_floating_point else made.fill_(90)

    @cached_property
    def num_pages(self) -> int:
        """Physical pages, one of which nobody has."""
        return self.shape.batch * self.shape.pages + 1

    @cached_property
    def block_table(self) -> torch.Tensor:
        """``[B, N]`` int32 pages in disorder."""
        options = {"generator": self.generator, "device": self.device}
        order = torch.randperm(self.num_pages, **options)[: self.num_pages - 1]
        return order.int().view(self.shape.batch, self.shape.pages)

    @cached_property
    def cache(self) -> torch.Tensor:
        """``[pages, Hk, P, 2 * D]`` keys and values, as vLLM lays them out."""
        shape = self.shape
        size = (self.num_pages, shape.kv_heads, shape.page, 2 * shape.dim)
        return self.normal(*size, dtype=shape.dtype)

    @cached_property
    def keys(self) -> torch.Tensor:
        """``[pages, P, Hk, D]`` view of the cache."""
        return self.cache.transpose(1, 2)[..., : self.shape.dim]

    @cached_property
    def values(self) -> torch.Tensor:
        """``[pages, P, Hk, D]`` view of the cache."""
        return self.cache.transpose(1, 2)[..., self.shape.dim :]

    def far(self, windows: int) -> FarPages:
        """Far pages of windows at the ends of the contexts, request by request in turn."""
        shape = self.shape
        begin = -(-shape.sink // shape.page)
        end = max(shape.tokens - shape.local, 0) // shape.page
        return FarPages(
            self.block_table,
            self.column([s % shape.batch for s in range(windows)]),
            self.column([begin] * windows),
            self.column([max(end, begin)] * windows),
        )

    def num_far(self) -> int:
        """Far pages of each window."""
        far = self.far(1)
        return int(far.end) - int(far.begin)

    def query_windows(self) -> QueryWindows:
        """Windows of a prompt: whole ones, and a last one of fewer tokens."""
        shape = self.shape
        tokens = max(min(shape.tokens, shape.chunk) - 3, 1)
        starts = range(0, tokens, shape.window)
        return QueryWindows(
            self.normal(tokens, shape.heads, shape.dim, dtype=shape.dtype),
            self.column(starts),
            self.column([min(shape.window, tokens - start) for start in starts]),
        )


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
