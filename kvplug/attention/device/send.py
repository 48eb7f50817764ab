"""What the host found, on its way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ALIGNED = 4
"""Numbers of int32 that make 16 bytes."""


def send(found: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same numbers on the device, by one copy that nobody waits for."""
    host = torch.from_numpy(found)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def send_columns(columns: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Columns as int32 on the device, by one copy that nobody waits for.

    Each begins at a multiple of 16 bytes. Triton compiles a program of its own for every set of
    pointers that do not, so others would go on being compiled while requests wait.
    """
    starts = np.cumsum([0, *(-(-len(column) // ALIGNED) * ALIGNED for column in columns)])
    whole = np.zeros(starts[-1], np.int32)
    for start, column in zip(starts, columns, strict=False):
        whole[start : start + len(column)] = column
    sent = send(whole, device).split(np.diff(starts).tolist())
    return [part[: len(column)] for part, column in zip(sent, columns, strict=True)]
