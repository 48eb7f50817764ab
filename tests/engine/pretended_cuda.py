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

LONGEST = 512
"""Tokens of the longest context that tests ask such an engine for."""


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


def with_graphs() -> None:
    """Has vLLM's second model runner want graphs of decoded tokens, by stand-ins of graphs."""
    import torch
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.platforms import current_platform

    from tests.pretended_graph import PretendedGraph

    resolve = CompilationConfig.resolve_cudagraph_mode_and_sizes

    def resolve_cudagraph_mode_and_sizes(config: Any, *args: Any, **kwargs: Any) -> Any:
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY  # vLLM's CPU platform takes it out
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = [1, 2, 4], 4
        return resolve(config, *args, **kwargs)

    taken: Any = CompilationConfig
    taken.resolve_cudagraph_mode_and_sizes = resolve_cudagraph_mode_and_sizes
    platform: Any = type(current_platform)
    platform.get_global_graph_pool = lambda _: (0, 0)
    cuda: Any = torch.cuda
    cuda.CUDAGraph = PretendedGraph
    cuda.graph = lambda graph, *_, **__: graph.capture()


def capture(llm: Any) -> list[int]:
    """Has an engine capture what it wants to, as the worker for CUDA does at its start.

    Returns:
        Requests of the steps that were captured.
    """
    from vllm.v1.worker.workspace import init_workspace_manager

    executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    init_workspace_manager(runner.device)  # which vLLM's worker for CPUs has no use for
    runner.capture_model()
    sizes: list[int] = runner.cudagraph_manager.captured_token_counts()
    return sizes


def _take_backend() -> None:
    """What kvplug asks the platform is answered as on CUDA."""
    from kvplug import binding, startup
    from kvplug.attention import backend
    from kvplug.attention.device.backend import DeviceBackend
    from kvplug.patches import checked_config

    patch: Any = checked_config
    adopt = patch.adopt

    def adopt_and_overlap(vllm_config: Any) -> None:
        adopt(vllm_config)
        # As on CUDA: the CPU platform, which the plugin wraps, has just switched it off.
        vllm_config.scheduler_config.async_scheduling = True

    patch.adopt = adopt_and_overlap
    taken: Any = DeviceBackend
    taken.supports_compute_capability = classmethod(lambda *_: True)
    backend.KvplugBackend = taken
    startup._is_on_cpu = lambda: False
    binding.warm_up = _warm_up


def _warm_up(impl: Any, shape: Any) -> None:
    """What is compiled on CUDA, in place of what runs on CPUs; contexts here are short."""
    from kvplug.attention.device.warm_up import warm_up

    assert warm_up(impl, impl.cache.keys.dtype, LONGEST)
