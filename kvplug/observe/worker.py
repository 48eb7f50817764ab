"""What a worker says of itself when it is asked (vLLM's ``--worker-extension-cls``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from kvplug.offload.pools import Pools

EXTENSION = f"{__name__}.KvplugWorker"
"""What vLLM's config calls it."""


class KvplugWorker:
    """Joins vLLM's worker class; its methods are called through ``collective_rpc``."""

    model_runner: Any
    rank: int

    def kvplug_status(self) -> dict[str, Any]:
        """Layers that retrieve, bytes, and everything counted since the start.

        Bytes of the index are those of a full cache; those of buffers are of the largest step so
        far, and those of the pool hold the most that was mapped of a file behind it.
        """
        layers = self.model_runner.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers if hasattr(getattr(layer, "impl", None), "stages")]
        pipelines = {id(impl.pipeline): impl.pipeline for impl in impls}.values()
        counts = Counter[str]()
        for pipeline in pipelines:
            counts.update(asdict(pipeline.counts))
        pools = Pools(impl.hot for impl in impls if impl.hot is not None)
        return {
            "rank": self.rank,
            "layers": len(impls),
            "retrieving_layers": sum(impl.cache is not None for impl in impls),
            "index_bytes": sum(pipeline.nbytes() for pipeline in pipelines),
            "buffer_bytes": sum(pipeline.scratch_bytes() for pipeline in pipelines),
            "pool_bytes": pools.nbytes,
            "kv_bytes": sum(each.kv_cache.nbytes for each in layers if hasattr(each, "kv_cache")),
            "selection": dict(counts),
            "pool": asdict(pools.counts) if pools.pools else None,
        }
