"""The operator of xformers that attends to pages, or why there is none here."""

from __future__ import annotations

from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kvplug.errors import KvplugError

SERVED = SpecifierSet(">=0.0.35,<0.0.36")
"""Versions whose source says what :mod:`kvplug.attention.attend.xformers` relies on."""
TRITON_BEFORE = Version("3.9")
"""The first Triton without block pointers, which these versions' kernel is written with."""
KEYS = 64
"""Keys that a program takes at a time, xformers' own default; or a page, where it has fewer."""


def operator_of(head_dim: int, page: int, has_cap: bool, device: str) -> type[Any]:
    """xformers' operator for heads and pages of a size, which cuts no row.

    Args:
        head_dim: D.
        page: P.
        has_cap: Whether the model caps its logits.
        device: Where the cache lies.

    Raises:
        KvplugError: There is none here, with the reason.
    """
    if has_cap:
        raise KvplugError("xformers cannot cap logits, as this model does: use attend 'triton'.")
    try:
        import triton
        import xformers

        _check_versions(xformers.__version__, triton.__version__)
        from xformers.ops import fmha
    except ImportError as error:
        raise KvplugError(
            f"Attend 'xformers' needs kvplug[xformers], which cannot be imported ({error}): "
            f"install it, or use attend 'triton'."
        ) from error
    operator: type[Any] = fmha.triton_splitk.FwOp.get_operator(1, block_n=min(page, KEYS))
    # Asked of xformers itself, which would otherwise refuse in the middle of a step.
    keys = torch.empty((1, page, 1, head_dim), dtype=torch.float16, device=device)
    table = torch.zeros((1, 1), dtype=torch.int32, device=device)
    mask = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [1], [page], table, page, device=keys.device
    )
    reasons = operator.not_supported_reasons(fmha.Inputs(keys[:, :1], keys, keys, mask))
    if reasons:
        raise KvplugError(
            f"xformers does not serve heads of {head_dim} in pages of {page} on {device} "
            f"({'; '.join(reasons)}): use attend 'triton'."
        )
    return operator


def _check_versions(xformers: str, triton: str) -> None:
    """Refuses what its source was not read of, and a Triton that cannot compile its kernel.

    Raises:
        KvplugError: With the version.
    """
    if not SERVED.contains(xformers, prereleases=True):
        raise KvplugError(
            f"Attend 'xformers' needs xformers {SERVED}, not {xformers}: install kvplug[xformers], "
            f"or use attend 'triton'."
        )
    if Version(triton) >= TRITON_BEFORE:
        raise KvplugError(
            f"xformers' kernel needs block pointers, which Triton {triton} no longer has: install "
            f"one before {TRITON_BEFORE}, or use attend 'triton'."
        )
