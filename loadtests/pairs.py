"""Two servers on the same prompts, request by request: how much sooner, and the same answers?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvplug.evals.bootstrap import Interval
from kvplug.loadtests.intervals import quantiles
from kvplug.loadtests.records import Record


@dataclass(frozen=True)
class Pair:
    """A server against the first one. Ratios above 1: it is faster."""

    setup: str
    base: str
    requests: int
    """That succeeded on both."""
    ttft: Interval | None
    """Median over requests of the ratio of first tokens; None without requests."""
    gap: Interval | None
    total: Interval | None
    same_text: int
    """Requests with the same answer, letter for letter."""
    right: int
    """Requests that had something to be right about, and were, here."""
    base_right: int
    checked: int
    output_ratio: float | None
    """Output tokens per second, of everything that succeeded, over the base's."""


def pair(
    base: Sequence[Record], mine: Sequence[Record], base_tok_s: float, tok_s: float
) -> Pair | None:
    """Compares two servers.

    Args:
        base: Requests of the first one.
        mine: Those of the other.
        base_tok_s: Output tokens per second of the first.
        tok_s: Those of the other.

    Returns:
        None if one of them was asked nothing.
    """
    if not base or not mine:
        return None
    theirs = {record.key: record for record in base if record.error is None}
    both = [(theirs[r.key], r) for r in mine if r.error is None and r.key in theirs]
    checked = [(a, b) for a, b in both if a.right is not None and b.right is not None]
    return Pair(
        mine[0].setup, base[0].setup, len(both),
        _ratio([(a.ttft, b.ttft) for a, b in both]), _ratio([(a.gap, b.gap) for a, b in both]),
        _ratio([(a.total, b.total) for a, b in both]), sum(a.text == b.text for a, b in both),
        sum(bool(b.right) for _, b in checked), sum(bool(a.right) for a, _ in checked),
        len(checked), tok_s / base_tok_s if base_tok_s else None,
    )  # fmt: skip


def _ratio(values: Sequence[tuple[float | None, float | None]]) -> Interval | None:
    """The median ratio, where both sides have a value."""
    found = [[theirs / mine] for theirs, mine in values if theirs is not None and mine]
    return quantiles(found, [0.5])[0] if found else None
