"""Checks of launchers' arguments: a kernel reads through bare pointers, so nothing else would."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What keys and queries may be."""
HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head sizes that kernels are written and tested for."""
PAGES = (16, 32, 64, 128)
"""Tokens per page that kernels are written and tested for."""


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError with the sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def check(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str],
    dtypes: torch.dtype | Sequence[torch.dtype],
    *,
    contiguous: bool = True,
) -> None:
    """Refuses a tensor that a kernel would read wrongly.

    Args:
        name: Of the argument.
        tensor: The argument.
        shape: A size for each dimension, or the name of one that may have any.
        dtypes: The dtype, or those allowed.
        contiguous: Whether all of it must be; else the last dimension only.

    Raises:
        ValueError: Shape, dtype or strides are not these.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want
        for have, want in zip(tensor.shape, shape, strict=True)
    )
    dense = tensor.is_contiguous() if contiguous else tensor.dim() == 0 or tensor.stride(-1) == 1
    if fits and dense and tensor.dtype in allowed:
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    layout = "contiguous" if contiguous else "contiguous in the last dimension"
    raise ValueError(
        f"{name} must be {kinds} [{', '.join(map(str, shape))}], {layout}, not {tensor.dtype} "
        f"{list(tensor.shape)} with strides {list(tensor.stride())}."
    )


def check_devices(**tensors: torch.Tensor | None) -> None:
    """Refuses tensors of different devices; None is left out.

    Raises:
        ValueError: Two lie on different devices.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"All tensors of a launch must be on one device, not {places}.")


def check_head_dim(dim: int) -> None:
    """Refuses head sizes that no kernel was tested with.

    Raises:
        ValueError: See :data:`HEAD_DIMS`.
    """
    require(dim in HEAD_DIMS, f"Head size must be one of {HEAD_DIMS}, not {dim}.")


def check_page(page: int) -> None:
    """Refuses page sizes that no kernel was tested with.

    Raises:
        ValueError: See :data:`PAGES`.
    """
    require(page in PAGES, f"Page size must be one of {PAGES} tokens, not {page}.")
