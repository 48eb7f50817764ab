"""What looks on while layers attend: audits and traces, by the user's options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvplug.errors import KvplugError
from kvplug.exact_mass import ExactAttention
from kvplug.observe.audit import LayerAudit, Sampler
from kvplug.observe.mass_meter import MassMeter
from kvplug.observe.trace import LayerTrace, Trace

if TYPE_CHECKING:
    import torch

    from kvplug.config import KvplugConfig
    from kvplug.page_reader import PageReader
    from kvplug.pipeline import Plan
    from kvplug.stage import LayerShape

Observer = Callable[["torch.Tensor", "Plan"], None]
"""Told the queries ``[T, H, D]`` and the plan once a layer's pages are selected."""


@dataclass(frozen=True)
class Observers:
    """Of all layers of a worker."""

    sampler: Sampler | None = None
    """Says which windows are audited."""
    trace: Trace | None = None
    """Takes what every window selected."""

    @classmethod
    def of(cls, config: KvplugConfig, head: dict[str, Any], *, is_first: bool) -> Observers:
        """What an engine's options ask for.

        Args:
            config: The user's options.
            head: What the first line of a trace says.
            is_first: Whether this is the first worker, which alone traces: the requests and the
                KV heads that it has.

        Raises:
            KvplugError: A trace file that cannot be made.
        """
        sampler = Sampler(config.audit) if config.audit else None
        traces = config.trace is not None and is_first
        return cls(sampler, Trace(str(config.trace), head) if traces else None)

    def for_layer(self, shape: LayerShape, reader: PageReader | None) -> Observer | None:
        """What looks on in one layer; None for nothing.

        Args:
            shape: The layer's geometry.
            reader: Reads its keys.

        Raises:
            KvplugError: They cannot be read.
        """
        if self.sampler is None and self.trace is None:
            return None
        if reader is None:
            raise KvplugError(
                "kvplug options audit and trace read keys back from the KV cache, and kvplug "
                "cannot tell how this CPU's kernel packs them: choose another --kv-cache-dtype, or "
                "leave them out."
            )
        observers: list[Observer] = []
        if self.sampler is not None:
            meter = MassMeter(reader, shape.scale, shape.softcap, since=0)
            observers.append(LayerAudit(meter, self.sampler, shape.layer))
        if self.trace is not None:
            exact = ExactAttention(reader, shape.scale, shape.softcap)
            observers.append(LayerTrace(exact, self.trace, shape.layer))
        return observers[0] if len(observers) == 1 else _both(*observers)


def _both(first: Observer, second: Observer) -> Observer:
    """One after the other."""

    def observe(queries: torch.Tensor, plan: Plan) -> None:
        first(queries, plan)
        second(queries, plan)

    return observe
