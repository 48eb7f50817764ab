"""What an engine on CUDA is refused for, in one sentence; the platform is made up."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from kvplug import startup
from kvplug.attention.device.refusals import check_recipe
from kvplug.errors import KvplugError
from kvplug.index.simhash import SimHash
from kvplug.patches import request_knobs
from kvplug.policies.base import Stages
from kvplug.probe.base import Probe
from kvplug.probe.mean import MeanProbe
from kvplug.probe.union import UnionProbe
from tests.test_startup import engine


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_is_on_cpu", lambda: False)


def gpu_engine(options: dict[str, Any], **changed: Any) -> Any:
    config = engine(options, **changed)
    config.model_config.get_head_size = lambda: 128
    config.parallel_config.use_ubatching, config.parallel_config.world_size = False, 1
    config.model_config.dtype, config.cache_config.cache_dtype = torch.bfloat16, "auto"
    config.model_config.get_num_layers = lambda parallel: 12
    config.model_config.get_num_kv_heads = lambda parallel: 8
    config.compilation_config = SimpleNamespace(cudagraph_mode=None)
    config.observability_config = SimpleNamespace(jit_monitor_mode="warn")
    return config


@pytest.mark.parametrize(
    "options", [{}, {"attend": "flash"}, {"attend": "xformers"}, {"graphs": True}], ids=str
)
def test_pages_may_leave_the_gpu(options: dict[str, Any]) -> None:
    """The scheduler sees as large a cache as is asked for."""
    offload = {"tier": "host", "cold_gib": 3.0, "hot_gib": 0.5}
    config = gpu_engine({"offload": offload, "options": options})
    startup.adopt(config)
    assert config.cache_config.kv_cache_memory_bytes == 3 * 2**30


@pytest.mark.parametrize(
    "policy",
    ["channels", "quest", "simhash", "hcam", "infllm", "actqkv", "hax", "streaming", "dense"],
)
def test_recipes_that_are_served(policy: str) -> None:
    config = gpu_engine({"policy": policy})
    startup.adopt(config)
    assert config.cache_config.block_size == 32


@pytest.mark.parametrize("select", ["top", "union"])
@pytest.mark.parametrize(
    "index", ["buckets", "channels", "chunk_mean", "minmax", "representative", "simhash"]
)
@pytest.mark.parametrize(
    "probe", ["activation", "last_activated", "mean", ["activation", "last_activated"]], ids=str
)
def test_their_stages_go_together(index: str, probe: str, select: str) -> None:
    options = {"index": index, "probe": probe, "select": select}
    config = gpu_engine({"policy": "infllm", "options": options})
    startup.adopt(config)


@pytest.mark.parametrize("budget", ["entropy", "fixed", "top_p"])
def test_budgets_that_are_served(budget: str) -> None:
    startup.adopt(gpu_engine({"policy": "channels", "options": {"budget": budget}}))


@pytest.mark.parametrize(
    ("options", "what", "instead"),
    [
        ({"policy": "emllm"}, "Segment 'surprise'",
         "policy channels, quest, simhash, hcam, infllm, actqkv, hax, streaming or dense"),
        ({"policy": "quest", "options": {"budget": "recall"}}, "Budget 'recall'",
         "one of entropy, fixed, none, top_p."),
    ],
    ids=str,
)  # fmt: skip
def test_recipes_that_are_not(options: dict[str, Any], what: str, instead: str) -> None:
    with pytest.raises(KvplugError) as caught:
        startup.adopt(gpu_engine(options))
    assert str(caught.value).startswith(what)
    assert f"on CUDA choose {instead}" in str(caught.value)


@dataclass(frozen=True)
class OwnProbe(MeanProbe):
    """Of somebody's package."""

    name = "own"


@pytest.mark.parametrize("probe", [OwnProbe(), UnionProbe((MeanProbe(), OwnProbe()))], ids=str)
def test_probes_that_are_not(probe: Probe) -> None:
    """Alone or among others; what one of ours became elsewhere is not ours."""
    with pytest.raises(KvplugError, match="Probe 'own' runs on CPUs only: on CUDA choose one of"):
        check_recipe(Stages(index=SimHash(), probe=probe))


@pytest.mark.parametrize(
    ("options", "changed", "what"),
    [
        ({"audit": 0.5}, {}, "option audit"),
        ({"trace": "trace.jsonl"}, {}, "option trace"),
        ({"policy": "hcam", "options": {"merge": "coarse"}}, {}, "use merge 'exact'"),
        ({"window": 16384}, {}, "window=16384 is more than its kernels take: up to 8192"),
        ({"offload": {"tier": "disk", "path": "."}}, {},
         "tier 'disk' runs on CPUs only: on CUDA use tier 'host'"),
        ({"offload": {"tier": "host", "eviction": "mass"}}, {},
         "eviction 'mass' runs on CPUs only: on CUDA use eviction 'lru'"),
        ({"offload": {"tier": "host", "prefetch": ["last", "events"]}}, {},
         "prefetch last, events runs on CPUs only: on CUDA leave it out"),
        ({"offload": {"tier": "host"}}, {"parallel_config__world_size": 2},
         "never tried with several GPUs, and this engine has 2"),
        ({"offload": {"tier": "host", "hot_gib": 0.1}}, {},
         "hot_gib=0.1 is too small: one window's pages in 10 layers take 0.1575 GiB"),
        ({}, {"parallel_config__use_ubatching": True}, "--ubatch-size"),
        ({}, {"cache_config__block_size": 256, "cache_config__user_specified_block_size": True},
         "--block-size on CUDA must be one of"),
        ({}, {"cache_config__cache_dtype": "fp8"}, "use --kv-cache-dtype bfloat16, not fp8"),
        ({}, {"model_config__dtype": "torch.float32"}, "--dtype float32"),
        ({}, {"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL")}, "mode FULL"),
        ({}, {"observability_config__jit_monitor_mode": "error"}, "--jit-monitor-mode error"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_not_served(
    options: dict[str, Any], changed: dict[str, Any], what: str
) -> None:
    config = gpu_engine(options)
    for path, value in changed.items():
        section, _, name = path.partition("__")
        setattr(getattr(config, section), name, value)
    with pytest.raises(KvplugError, match=what):
        startup.adopt(config)


def test_drafts_and_odd_heads_are_refused() -> None:
    config = gpu_engine({})
    config.speculative_config = object()
    with pytest.raises(KvplugError, match="--speculative-config"):
        startup.adopt(config)
    config = gpu_engine({})
    config.model_config.get_head_size = lambda: 72
    with pytest.raises(KvplugError, match="has heads of 72"):
        startup.adopt(config)


def test_attend_is_a_choice_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    startup.adopt(gpu_engine({"options": {"attend": "xformers"}}))
    config = gpu_engine({"options": {"attend": "flash"}})
    startup.adopt(config)
    monkeypatch.setattr(startup, "_is_on_cpu", lambda: True)
    with pytest.raises(KvplugError, match="chooses a kernel on CUDA"):
        startup.adopt(config)
    with pytest.raises(KvplugError, match="Unknown attend 'flesh'"):
        startup.adopt(gpu_engine({"options": {"attend": "flesh"}}))
    with pytest.raises(KvplugError, match="'attend' would have no effect"):
        startup.adopt(gpu_engine({"policy": "dense", "options": {"attend": "flash"}}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"options": {"graphs": True}}, None),
        ({"policy": "streaming", "options": {"graphs": True}}, None),
        ({"policy": "quest", "options": {"graphs": True, "attend": "triton"}}, None),
        ({"policy": "actqkv", "options": {"graphs": True}}, "index 'representative'"),
        ({"policy": "hcam", "options": {"graphs": True}}, "index 'chunk_mean'"),
        ({"options": {"graphs": True, "probe": "activation"}}, "probe 'activation'"),
        ({"options": {"graphs": True, "budget": "entropy"}}, "budget 'entropy'"),
        ({"options": {"graphs": True, "attend": "flash"}}, "attend 'flash'"),
        ({"options": {"graphs": 1}}, "'graphs' must be true or false, not 1"),
        ({"policy": "dense", "options": {"graphs": True}}, "'graphs' would have no effect"),
    ],
    ids=str,
)
def test_graphs_go_with_what_launches_the_same_kernels(
    options: dict[str, Any], reason: str | None
) -> None:
    with nullcontext() if reason is None else pytest.raises(KvplugError, match=reason):
        startup.adopt(gpu_engine(options))


def test_graphs_are_for_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_is_on_cpu", lambda: True)
    with pytest.raises(KvplugError, match="is for CUDA graphs"):
        startup.adopt(gpu_engine({"options": {"graphs": True}}))


def test_requests_that_ask_for_something_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's second model runner has no seam to tell the planner of it."""
    monkeypatch.setattr(request_knobs, "is_selected", lambda config: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    config = gpu_engine({})
    config.model_config.max_model_len = 4096
    plain = SimpleNamespace(extra_args={"of_another": 1})
    assert request_knobs._checked(config, plain) is None
    asking = SimpleNamespace(extra_args={"kvplug_dense": True})
    with pytest.raises(VLLMValidationError, match="cannot ask kvplug for anything on GPUs yet"):
        request_knobs._checked(config, asking)
