"""Kernels run on the GPU, or interpreted without one, on new memory that is full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import import_kernels, interpreted

HAS_GPU = torch.cuda.is_available()
GARBAGE = 0x5A
"""Every byte of a new tensor of integers."""

# Before the tests here are imported, and the kernels with them.
if not HAS_GPU:
    import_kernels()


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same function, whose result holds what no kernel should take for a number."""

    def made(*args: Any, **options: Any) -> torch.Tensor:
        tensor = make(*args, **options)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_contiguous() and tensor.numel():
            tensor.view(torch.uint8).fill_(GARBAGE)
        return tensor

    return made


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is poison."""
    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def triton_of_kernels() -> Iterator[None]:
    """The Triton that the kernels were imported with."""
    with nullcontext() if HAS_GPU else interpreted():
        yield


@pytest.fixture
def device() -> str:
    """Where kernels find their tensors."""
    return "cuda" if HAS_GPU else "cpu"
