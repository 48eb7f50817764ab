"""vLLM's CUDA platform in a process without a GPU: what kvplug's plugin does to it, as JSON.

Extension modules of the CUDA build are stood in for. Nothing of vLLM's is: it imports what it
imports on a GPU, selects backends and completes configs. The spec on stdin holds ``model``, a
folder with a ``config.json``, ``engines``, lists of engine arguments by name, and ``selectors``,
changes to what vLLM's selector asks of a backend, by name.
"""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

KINDS = ("Stream", "Event")


class Absent(ModuleType):
    """An extension that is not here; its functions say no."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: False


def pretend() -> type[Any]:
    """Makes this process's platform CUDA; its class, with ``capability`` to set."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    for name in (
        "vllm._C_stable_libtorch", "vllm.vllm_flash_attn",
        "vllm.vllm_flash_attn.flash_attn_interface",
    ):  # fmt: skip
        sys.modules[name] = Absent(name)
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(NonNvmlCudaPlatform):
        capability = (8, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*cls.capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "pretended"

    platforms._current_platform = Platform()
    from vllm import _custom_ops

    for name in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):
        setattr(_custom_ops, f"cutlass_{name}", lambda *_: False)
    return Platform


def selected(platform: Any, changed: dict[str, Any]) -> str:
    """The backend that vLLM takes for a layer, or why it takes none."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    platform.capability = tuple(changed.pop("capability", (9, 0)))
    asked = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None,
        **changed,
    }  # fmt: skip
    try:
        selector = AttentionSelectorConfig(**asked)
        return str(platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, selector))
    except ValueError as error:
        return str(error)


def engine(model: str, arguments: dict[str, Any]) -> dict[str, Any] | str:
    """What vLLM makes of an engine's arguments, or why it refuses them."""
    from vllm.engine.arg_utils import EngineArgs

    options = arguments.pop("kvplug", {})
    given: dict[str, Any] = {
        "attention_backend": "CUSTOM", "additional_config": {"kvplug": options},
        "skip_tokenizer_init": True, **arguments,
    }  # fmt: skip
    try:
        config = EngineArgs(model=model, **given).create_engine_config()
    except ValueError as error:
        return str(error)
    return {
        "block": config.cache_config.block_size,
        "cache_bytes": config.cache_config.kv_cache_memory_bytes,
        "second_runner": config.use_v2_model_runner,
        "graphs": config.compilation_config.cudagraph_mode.name,
    }


def main() -> None:
    """Runs the spec."""
    spec = json.loads(sys.stdin.read())
    import torch

    before = [getattr(torch.cuda, kind) for kind in KINDS] + [torch.Tensor.pin_memory]
    platform = pretend()
    from kvplug.patches import apply
    from kvplug.plugin import register

    register()
    after = [getattr(torch.cuda, kind) for kind in KINDS] + [torch.Tensor.pin_memory]
    result = {
        "torch_is_untouched": before == after,
        "patched": sorted(apply._originals),
        "selected": {name: selected(platform, one) for name, one in spec["selectors"].items()},
        "engines": {name: engine(spec["model"], one) for name, one in spec["engines"].items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
