"""Dense attention of decoded tokens, which retrieval is measured against.

torch's scaled dot-product attention with its flash backend alone, over contiguous keys and values,
in two ways; and FlashInfer's batch decode over pages, where it can be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from kvplug.bench.step_bytes import StepSize

WORKSPACE = 128 * 2**20
"""Bytes of scratch that FlashInfer is given."""
SDPA, GROUPED, FLASHINFER = "SDPA flash", "SDPA flash, heads as queries", "FlashInfer"


def has_flashinfer() -> bool:
    """Whether FlashInfer can be imported."""
    return importlib.util.find_spec("flashinfer") is not None


def kinds(
    size: StepSize, device: torch.device
) -> dict[str, Callable[[], Callable[[], torch.Tensor]]]:
    """Names of dense attention, and what makes inputs and gives a function that attends.

    Args:
        size: Of the step.
        device: A GPU.
    """
    found = {
        SDPA: lambda: sdpa(size, device, is_grouped=False),
        GROUPED: lambda: sdpa(size, device, is_grouped=True),
    }
    if has_flashinfer():
        found[FLASHINFER] = lambda: flashinfer(size, device)
    return found


def sdpa(size: StepSize, device: torch.device, *, is_grouped: bool) -> Callable[[], torch.Tensor]:
    """torch's, by its flash backend alone.

    Args:
        size: Of the step.
        device: A GPU; the backend is there on CPU too.
        is_grouped: A group's heads are queries of one head: the same sums, since a single query
            has nothing behind it that would be masked. Else heads stay heads.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = torch.nn.functional.scaled_dot_product_attention
    generator = torch.Generator(device).manual_seed(size.context)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    shape = (size.batch, size.kv_heads, size.context, size.dim)
    keys, values = (torch.empty(shape, **options).normal_(generator=generator) for _ in range(2))
    queries = torch.empty(size.batch, size.heads, 1, size.dim, **options)
    queries.normal_(generator=generator)
    if is_grouped:
        queries = queries.view(size.batch, size.kv_heads, -1, size.dim)

    def work() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(queries, keys, values, enable_gqa=not is_grouped)

    return work


def flashinfer(size: StepSize, device: torch.device) -> Callable[[], torch.Tensor]:
    """FlashInfer's, planned once, over pages in order."""
    library: Any = importlib.import_module("flashinfer")
    pages = size.batch * size.pages
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    cache = torch.empty(pages, 2, size.kv_heads, size.page, size.dim, **options).normal_()
    queries = torch.empty(size.batch, size.heads, size.dim, **options).normal_()
    starts = torch.arange(size.batch + 1, dtype=torch.int32, device=device) * size.pages
    last = size.context - (size.pages - 1) * size.page
    scratch = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=True)
    wrapper.plan(
        starts, torch.arange(pages, dtype=torch.int32, device=device),
        torch.full((size.batch,), last, dtype=torch.int32, device=device),
        size.heads, size.kv_heads, size.dim, size.page,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return lambda: wrapper.run(queries, cache)
