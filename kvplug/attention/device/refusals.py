"""What an engine on CUDA is refused for: recipes without kernels, and options that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvplug.budget.entropy import EntropyBudget
from kvplug.budget.fixed import FixedBudget, NoBudget
from kvplug.budget.top_p import TopPBudget
from kvplug.errors import KvplugError
from kvplug.index.buckets import Buckets
from kvplug.index.channels import Channels
from kvplug.index.chunk_mean import ChunkMean
from kvplug.index.minmax import MinMax
from kvplug.index.representative import Representative
from kvplug.index.simhash import SimHash
from kvplug.kernels.checks import HEAD_DIMS
from kvplug.kernels.distance import LONGEST_WINDOW
from kvplug.probe.activation import ActivationProbe
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.probe.mean import MeanProbe
from kvplug.probe.union import UnionProbe
from kvplug.select.top_pages import TopPages
from kvplug.select.union import Union

if TYPE_CHECKING:
    from kvplug.config import KvplugConfig, OffloadConfig
    from kvplug.policies.base import Stages
    from kvplug.stage import Stage

PAGES = (32, 64, 128)
"""Tokens per page that the kernels take and kvplug's windows are made of."""
DTYPES = ("bfloat16", "float16")
"""Of models that are served."""
UNTRIED = (
    "kvplug: this backend has never run on a GPU; its kernels ran in Triton's interpreter only, "
    "and were compiled for sm_80 and sm_90. Compare its answers with stock vLLM's before you "
    "rely on them: kvplug bench kernels checks every kernel on this device."
)
"""Logged once, where an engine starts on CUDA."""
PROBES = (ActivationProbe, LastAndActivatedProbe, MeanProbe)
"""Those that are served, and unions of them."""
RECIPES = "channels, quest, simhash, hcam, infllm, actqkv, hax, streaming or dense"


def check_recipe(stages: Stages) -> None:
    """Refuses a recipe with a stage that only runs on CPUs.

    Raises:
        KvplugError: With the stage's name, and those of its kind that are served.
    """
    probes = stages.probe.probes if isinstance(stages.probe, UnionProbe) else (stages.probe,)
    served: tuple[tuple[Stage | None, tuple[type[Stage], ...]], ...] = (
        (stages.segment, ()),
        (stages.index, (Buckets, Channels, ChunkMean, MinMax, Representative, SimHash)),
        *((probe, PROBES) for probe in probes),
        (stages.budget, (EntropyBudget, FixedBudget, NoBudget, TopPBudget)),
        (stages.select, (TopPages, Union)),
    )
    for stage, kinds in served:
        if stage is not None and type(stage) not in kinds:
            names = ", ".join(kind.name for kind in kinds)
            choice = f"one of {names}" if kinds else f"policy {RECIPES}"
            raise KvplugError(
                f"{stage.kind.capitalize()} {stage.name!r} runs on CPUs only: on CUDA choose "
                f"{choice}."
            )
    if stages.merge != "exact":
        raise KvplugError(f"Merge {stages.merge!r} runs on CPUs only: on CUDA use merge 'exact'.")


def check_offload(vllm_config: Any, offload: OffloadConfig) -> None:
    """Refuses what pages that leave a GPU are not served with.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
        offload: The user's tiers.

    Raises:
        KvplugError: With the reason.
    """
    refusals = {
        f"tier {offload.tier!r}": (offload.tier != "host", "use tier 'host'"),
        f"eviction {offload.eviction!r}": (offload.eviction != "lru", "use eviction 'lru'"),
        f"prefetch {', '.join(offload.prefetch)}": (bool(offload.prefetch), "leave it out"),
    }
    for what, (asked, instead) in refusals.items():
        if asked:
            raise KvplugError(
                f"kvplug option offload: {what} runs on CPUs only: on CUDA {instead}."
            )
    workers = vllm_config.parallel_config.world_size
    if workers > 1:
        raise KvplugError(
            f"kvplug option offload was never tried with several GPUs, and this engine has "
            f"{workers}: use one, or leave out offload."
        )


def check_graphs(stages: Stages) -> None:
    """Refuses CUDA graphs beside what launches other kernels from step to step.

    Raises:
        KvplugError: With the stage, or what attends.
    """
    captured: tuple[tuple[Stage | None, tuple[type[Stage], ...]], ...] = (
        (stages.index, (Channels, MinMax, SimHash)),
        (stages.probe, (LastAndActivatedProbe, MeanProbe)),
        (stages.budget, (FixedBudget, NoBudget)),
        (stages.select, (TopPages,)),
    )
    for stage, kinds in captured:
        if stage is not None and type(stage) not in kinds:
            names = ", ".join(kind.name for kind in kinds)
            raise KvplugError(
                f"Option 'graphs' does not go with {stage.kind} {stage.name!r}, whose kernels "
                f"differ from step to step: leave it out, or choose one of {names}."
            )
    if stages.attend not in (None, "triton"):
        raise KvplugError(
            f"Option 'graphs' does not go with attend {stages.attend!r}: leave one of them out."
        )


def check_engine(vllm_config: Any, config: KvplugConfig, stages: Stages, page: int) -> None:
    """Refuses what the backend for CUDA does not serve.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
        config: The user's options.
        stages: Of the recipe.
        page: Tokens per page.

    Raises:
        KvplugError: With the reason.
    """
    check_recipe(stages)
    if stages.graphs:
        check_graphs(stages)
    if config.offload is not None:
        check_offload(vllm_config, config.offload)
    if page not in PAGES:
        raise KvplugError(f"--block-size on CUDA must be one of {PAGES} for kvplug, not {page}.")
    if config.window > LONGEST_WINDOW:
        raise KvplugError(
            f"kvplug option window={config.window} is more than its kernels take: up to "
            f"{LONGEST_WINDOW} on CUDA."
        )
    dim = vllm_config.model_config.get_head_size()
    if dim not in HEAD_DIMS:
        raise KvplugError(
            f"kvplug's kernels take heads of {HEAD_DIMS}; {vllm_config.model_config.model} has "
            f"heads of {dim}."
        )
    own = str(vllm_config.model_config.dtype).removeprefix("torch.")
    given = vllm_config.cache_config.cache_dtype
    if given not in ("auto", own):
        raise KvplugError(
            f"kvplug serves caches of the model's own dtype on CUDA: use --kv-cache-dtype {own}, "
            f"not {given}."
        )
    graphs = vllm_config.compilation_config.cudagraph_mode
    refusals = {
        f"--dtype {own}": own not in DTYPES,
        # Of the modes that capture attention, vLLM makes the others PIECEWISE by itself.
        "cudagraph_mode FULL": graphs is not None and graphs.name == "FULL",
        # Not every kernel is compiled before the first request.
        "--jit-monitor-mode error": vllm_config.observability_config.jit_monitor_mode == "error",
        "kvplug option audit": bool(config.audit),
        "kvplug option trace": config.trace is not None,
        "kvplug option positions='fixed'": config.positions == "fixed",
        "--speculative-config": vllm_config.speculative_config is not None,
        "microbatches (--enable-dbo, --ubatch-size)": vllm_config.parallel_config.use_ubatching,
    }
    for what, asked in refusals.items():
        if asked:
            raise KvplugError(f"kvplug does not serve {what} on CUDA: leave it out.")
