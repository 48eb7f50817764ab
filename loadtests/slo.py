"""What a user may expect of a request: limits on its first token, its pace and its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvplug.errors import KvplugError, nearest_name
from kvplug.loadtests.records import Record

NAMES = ("e2e", "gap", "ttft")


@dataclass(frozen=True)
class Slo:
    """Seconds; infinite where nothing is promised. All count from the intended time."""

    ttft: float = math.inf
    gap: float = math.inf
    """Mean seconds between tokens."""
    e2e: float = math.inf
    share: float = 0.95
    """Of requests that must be good for a level of load to be sustained."""

    def is_good(self, record: Record) -> bool:
        """Whether a request succeeded within every limit; what is right is counted elsewhere."""
        if record.error is not None or record.ttft is None:
            return False
        gap = record.gap or 0.0
        return record.ttft <= self.ttft and gap <= self.gap and record.total <= self.e2e

    def __str__(self) -> str:
        """In words."""
        limits = [
            f"{name} at most {value:g} s"
            for name, value in (("ttft", self.ttft), ("gap", self.gap), ("e2e", self.e2e))
            if value < math.inf
        ]
        return ", ".join(limits) or "no limits"


def parse_slo(text: str, share: float) -> Slo:
    """Reads ``ttft=2,gap=0.1,e2e=30``.

    Args:
        text: Limits in seconds; empty for none.
        share: See :attr:`Slo.share`.

    Raises:
        KvplugError: Unknown name, or a limit that is not a positive number.
    """
    limits = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        if name not in NAMES:
            raise KvplugError(f"Unknown limit {name!r} in --slo: {nearest_name(name, NAMES)}.")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not limits[name] > 0:
            raise KvplugError(f"--slo {part!r} must be like {name}=2, in seconds above 0.")
    if not 0 < share <= 1:
        raise KvplugError(f"--slo-share gives {share:g}; it must be above 0 and at most 1.")
    return Slo(**limits, share=share)
