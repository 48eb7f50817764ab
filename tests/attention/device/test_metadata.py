"""What vLLM's model runner is told of the backend for CUDA, and what it must tell."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability

from kvplug.attention.backend import backend_of
from kvplug.attention.cpu_backend import CpuBackend
from kvplug.attention.device.backend import DeviceBackend
from kvplug.attention.device.impl import DeviceImpl
from kvplug.attention.device.metadata import DeviceMetadataBuilder
from kvplug.attention.metadata import KvplugMetadataBuilder
from kvplug.errors import KvplugError
from tests.attention.device.world import World, layers_of
from tests.made_up import Piece


def platform(name: str) -> Any:
    return SimpleNamespace(
        is_cpu=lambda: name == "cpu", is_cuda=lambda: name == "cuda", device_name=name
    )


def test_the_platform_decides() -> None:
    assert backend_of(platform("cpu")) is CpuBackend
    assert backend_of(platform("cuda")) is DeviceBackend
    with pytest.raises(KvplugError, match="on CPUs and CUDA only, not on xpu"):
        backend_of(platform("xpu"))


def test_blocks_are_pages() -> None:
    """vLLM's default of 16 tokens becomes 32; what a user gives must be a page."""
    assert DeviceBackend.get_preferred_block_size(16) == 32
    assert [
        size for size in (16, 32, 64, 96, 128, 256) if DeviceBackend.supports_block_size(size)
    ] == [32, 64, 128]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"head_size": 48}, "head_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"dtype": torch.float32}, "dtype"),
        ({"has_sink": True}, "sink"),
        ({"use_mla": True}, "MLA"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability"),
    ],
    ids=str,
)
def test_what_vllm_refuses(changed: dict[str, Any], reason: str | None) -> None:
    selector = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
    }  # fmt: skip
    reasons = DeviceBackend.validate_configuration(**{**selector, **changed})
    assert (reasons == []) if reason is None else reason in "; ".join(reasons)


@pytest.mark.parametrize(
    "missing", [{"is_prefilling": None}, {"seq_lens_cpu_upper_bound": None}, {"causal": False}]
)
def test_a_runner_that_does_not_say_enough_is_refused(missing: dict[str, Any]) -> None:
    world = World("streaming")
    common = world.common([Piece(0, 0, 5, True)])
    with pytest.raises(KvplugError, match="by vLLM's own model runner only"):
        world.builder.build(0, replace(common, **missing))


@pytest.mark.parametrize(
    ("pieces", "made_up"),
    [
        ([Piece(0, 0, 40, False), Piece(1, 0, 1, False)], True),
        ([Piece(0, 0, 40, True), Piece(1, 0, 1, False)], False),
        ([Piece(0, 0, 1, True)], False),
        ([Piece(0, 1, 1, False)], False),
    ],
    ids=["of vLLM", "a prompt beside it", "a prompt of one token", "its second token"],
)
def test_steps_of_nobody_are_not_planned(pieces: list[Piece], made_up: bool) -> None:
    """vLLM's dummy requests decode without anything before."""
    world = World("streaming")
    metadata = world.builder.build(0, world.common(pieces))
    assert (metadata.plan is None) == made_up
    tokens = sum(piece.tokens for piece in pieces)
    assert world.builder.pipeline.counts.dense_tokens == (0 if made_up else tokens)


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [(4, [0.5, 0.5], "ALiBi"), (9, "model.layers.0", "shared"), (8, "encoder", "encoder")],
)
def test_layers_that_are_refused(at: int, value: Any, what: str) -> None:
    arguments = [2, 64, 0.125, 1, None, None, "auto", None, "decoder", None]
    arguments[at] = value
    with pytest.raises(KvplugError, match=what):
        DeviceImpl(*arguments)


@pytest.mark.parametrize("own", [DeviceMetadataBuilder, KvplugMetadataBuilder])
def test_builders_that_vllm_derives_are_refused(own: Any) -> None:
    """On CPUs too: what their windows would be cut by is not the batch's."""
    derived = type("ChunkedLocalAttentionBuilder", (own,), {})
    with pytest.raises(KvplugError, match="by ChunkedLocalAttentionBuilder"):
        derived(None, [], None, None)


def test_sliding_windows_are_vllms_own() -> None:
    impl = DeviceImpl(2, 64, 0.125, 1, None, 512, "auto")
    assert impl.is_windowed
    assert impl.is_dense


@pytest.mark.parametrize(("sliding", "planned"), [((96, 96), False), ((96, None), True)], ids=str)
def test_groups_of_layers_with_and_without_windows(
    sliding: tuple[int | None, ...], planned: bool
) -> None:
    """Without vLLM's hybrid cache manager they share one, and the layers without retrieve."""
    world = World("streaming")
    impls, builder, _ = layers_of(world.shape, world.config, 2, sliding)
    assert [impl.retrieves for impl in impls] == [window is None for window in sliding]
    metadata = builder.build(0, world.common([Piece(0, 0, 5, True)]))
    assert (metadata.plan is not None) == planned


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("streaming")

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(world.builder.pipeline, "make_layer", full)
    with pytest.raises(KvplugError, match="lower --gpu-memory-utilization"):
        world.impl.bind(world.cache, world.geometry)


def test_another_budget() -> None:
    pipeline = World("simhash").builder.pipeline
    pipeline.set_budget(64)
    assert pipeline.geometry.budget_pages == 4
    with pytest.raises(KvplugError, match="at least one page"):
        pipeline.set_budget(8)
    assert pipeline.geometry.budget_pages == 4
