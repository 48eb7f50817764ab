"""Whether a kernel's arithmetic is as accurate as it can be expected to be."""

from __future__ import annotations

import torch

EPS = 2.0**-24
"""Half a unit in the last place of a float32 of 1."""


def assert_accurate(
    found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, floor: float
) -> None:
    """The error is at most twice that of plain torch in the same dtype.

    Args:
        found: By the kernel.
        plain: By the twin in float32.
        exact: By the twin in float64.
        floor: What rounding alone can make of an error that plain torch happens not to have.
    """
    assert found.isfinite().equal(exact.isfinite())
    known = exact.isfinite()
    error = (found.double() - exact)[known].abs().max().item()
    allowed = 2 * (plain.double() - exact)[known].abs().max().item() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
