"""What a worker says of itself when it is asked (vLLM's ``--worker-extension-cls``)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

EXTENSION = f"{__name__}.KvplugWorker"
"""What vLLM's config calls it."""


class KvplugWorker:
    """Joins vLLM's worker class; its methods are called through ``collective_rpc``."""

    model_runner: Any
    rank: int

    def kvplug_status(self) -> dict[str, Any]:
        """Layers that retrieve, bytes, and everything counted since the start."""
        layers = self.model_runner.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers if hasattr(getattr(layer, "impl", None), "stages")]
        pipelines = list({id(impl.pipeline): impl.pipeline for impl in impls}.values())
        stages = [impl.stages for impl in impls if impl.stages is not None]
        shared = {id(m): m for pipeline in pipelines for m in pipeline.common.values()}
        counts: dict[str, int] = {}
        for pipeline in pipelines:
            for name, count in asdict(pipeline.counts).items():
                counts[name] = counts.get(name, 0) + count
        pools = [impl.hot for impl in impls if impl.hot is not None]
        return {
            "rank": self.rank,
            "layers": len(impls),
            "retrieving_layers": sum(impl.cache is not None for impl in impls),
            "index_bytes": sum(layer.nbytes() for layer in stages)
            + sum(memory.nbytes() for memory in shared.values()),
            "kv_bytes": sum(each.kv_cache.nbytes for each in layers if hasattr(each, "kv_cache")),
            "selection": counts,
            "pool": asdict(sum((pool.counts for pool in pools[1:]), pools[0].counts))
            if pools
            else None,
        }
