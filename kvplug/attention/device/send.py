"""What the host found, on its way to the device."""

from __future__ import annotations

import numpy as np
import torch


def send(found: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same numbers on the device, by one copy that nobody waits for."""
    host = torch.from_numpy(found)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
