"""The cold store of a GPU: vLLM's paged cache in pinned memory of the host.

The GPU reads and writes it across the bus at addresses of its own (unified addressing), so to vLLM
it is memory of the GPU: its kernels write new keys and values there, and attend there where nothing
is retrieved.
"""

from __future__ import annotations

import psutil
import torch

from kvplug.errors import KvplugError
from kvplug.offload.cold_store import GIB, register


class HostStore:
    """One worker's pages."""

    most_mapped = 0
    """Nothing is mapped."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._memory: torch.Tensor | None = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """``[nbytes]`` int8 zeros that live in the store, as the device sees them.

        Raises:
            KvplugError: There is no room, or the GPU cannot read it.
        """
        from vllm.platforms import current_platform

        free = psutil.virtual_memory().available
        if nbytes > free:
            raise KvplugError(
                f"kvplug option offload.cold_gib asks for {nbytes / GIB:.1f} GiB of the host's "
                f"memory, which has {free / GIB:.1f} GiB free."
            )
        self._memory = torch.zeros(nbytes, dtype=torch.int8)
        view = self._memory if current_platform.is_cpu() else seen_by_device(self._memory)
        register(view, self)
        return view


def seen_by_device(memory: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of the GPU; it is pinned.

    torch's own pinned memory would be rounded up to the next power of two.

    Args:
        memory: Of the host; must outlive the result.

    Raises:
        KvplugError: The memory cannot be pinned, or the GPU has no addresses for it.
    """
    from vllm.utils.platform_utils import is_uva_available
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
    from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

    if not is_uva_available():
        raise KvplugError(
            "kvplug option offload needs a GPU that reads the host's memory (unified addressing), "
            "which this one does not: leave it out."
        )
    try:
        pin_tensor(memory)
    except RuntimeError as error:
        raise KvplugError(
            f"kvplug option offload.cold_gib: {memory.nbytes / GIB:.1f} GiB of the host's memory "
            f"could not be pinned ({error}): ask for less, or raise the limit of locked memory."
        ) from error
    if not memory.is_pinned():  # vLLM would make a copy that is
        raise KvplugError(
            "kvplug option offload.cold_gib: the host's memory was pinned, but torch does not see "
            "it; refusing to serve."
        )
    return get_accelerator_view_from_cpu_tensor(memory)
