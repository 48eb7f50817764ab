"""Every request has a document of its own, with one fact to find: nothing is shared."""

from __future__ import annotations

from kvplug.loadtests.workloads.base import Materials, Session, needle_turn


class Needles:
    """One document, one question."""

    name = "needles"

    def session(self, number: int, materials: Materials) -> Session:
        """See :class:`Workload`."""
        return Session(number, [needle_turn(materials, materials.lengths, number, "needle")], [])
