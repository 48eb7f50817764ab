"""kvplug's backend for CUDA in a real engine without a GPU: every Triton kernel is interpreted.

vLLM's CPU platform runs its second model runner too, if it finds a Triton that runs on CPUs; here
it finds Triton's interpreter. What is pretended is only what kvplug and vLLM ask the platform for.
So the scheduler, which plans a step while another runs, both model runners, their metadata, vLLM's
own Triton kernels and kvplug's run as on a GPU, but for what a GPU does by itself: streams, graphs,
compiled code.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any


def pretend() -> None:
    """Makes this process's engines take the backend for CUDA; before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.backends import backends
    from triton.runtime import interpreter

    from tests.interpreter import remember_builtins

    remember_builtins()
    builder: Any = interpreter.interpreter_builder
    # Kernels are tested with these checks by themselves; they double the time.
    builder.options = replace(builder.options, sanitize_overflow=False)
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # vLLM's kernel that writes keys asks
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON
    _take_backend()


def _take_backend() -> None:
    """What kvplug asks the platform is answered as on CUDA."""
    from kvplug import binding, startup
    from kvplug.attention import backend
    from kvplug.attention.device.backend import DeviceBackend
    from kvplug.patches import checked_config

    adopt = checked_config.adopt

    def adopt_and_overlap(vllm_config: Any) -> None:
        adopt(vllm_config)
        # As on CUDA: the CPU platform, which the plugin wraps, has just switched it off.
        vllm_config.scheduler_config.async_scheduling = True

    checked_config.adopt = adopt_and_overlap
    taken: Any = DeviceBackend
    taken.supports_compute_capability = classmethod(lambda *_: True)
    backend.KvplugBackend = taken
    startup._is_on_cpu = lambda: False
    binding.warm_up = lambda *_: None  # of what runs on CPUs
