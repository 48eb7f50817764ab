"""What no attention layer of a model may have, on any platform."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionType

from kvplug.errors import KvplugError


def refuse_layer(impl: Any, **platform: bool) -> None:
    """Refuses a layer that page retrieval cannot serve.

    Args:
        impl: vLLM's implementation of the layer's attention.
        platform: What else its platform's backend refuses, and whether it is there; underscores
            stand for spaces.

    Raises:
        KvplugError: With what the layer has.
    """
    refusals = {
        "ALiBi position biases": impl.alibi_slopes is not None,
        "attention sinks": impl.sinks is not None,
        "encoder or cross attention": impl.attn_type != AttentionType.DECODER,
        "KV caches shared between layers": impl.kv_sharing_target_layer_name is not None,
        **{what.replace("_", " "): present for what, present in platform.items()},
    }
    for what, present in refusals.items():
        if present:
            raise KvplugError(f"kvplug cannot serve this model: it has {what}.")


def refuse_builder(kind: type, own: type) -> None:
    """Refuses layers for which vLLM plans others than the batch's requests, pages or lengths.

    It does so in a subclass of a backend's builder: for chunked local attention, say, or for
    sinks that have keys of their own.

    Args:
        kind: Class of the builder that vLLM makes.
        own: The backend's.

    Raises:
        KvplugError: They are not the same.
    """
    if kind is not own:
        raise KvplugError(
            f"kvplug cannot serve this model: vLLM plans its attention by {kind.__name__}, which "
            f"changes what kvplug cuts windows by."
        )
