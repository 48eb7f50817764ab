"""The backend class that ``--attention-backend CUSTOM`` names: that of vLLM's platform."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from kvplug.errors import KvplugError


def backend_of(platform: Any) -> type[Any]:
    """The backend of a platform.

    Args:
        platform: vLLM's.

    Raises:
        KvplugError: There is none.
    """
    if platform.is_cpu():
        from kvplug.attention.cpu_backend import CpuBackend

        return CpuBackend
    if platform.is_cuda():
        from kvplug.attention.device.backend import DeviceBackend

        return DeviceBackend
    raise KvplugError(
        f"This version of kvplug serves vLLM on CPUs and CUDA only, not on {platform.device_name}."
    )


KvplugBackend = backend_of(current_platform)
"""What vLLM finds at :data:`kvplug.selection.BACKEND_PATH`."""
