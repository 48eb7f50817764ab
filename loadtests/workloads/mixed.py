"""Short and long requests together: does a long prompt hold up the short ones?"""

from __future__ import annotations

from kvplug.loadtests.workloads.base import Materials, Session, needle_turn


class Mixed:
    """Each request is short with some probability; both kinds have facts to find."""

    name = "mixed"

    def session(self, number: int, materials: Materials) -> Session:
        """See :class:`Workload`."""
        is_short = materials.source("which", number).random() < materials.short_share
        lengths = materials.short if is_short else materials.lengths
        turn = needle_turn(materials, lengths, number, "short" if is_short else "long")
        return Session(number, [turn], [])
