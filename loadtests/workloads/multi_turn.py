"""Conversations: one document, then a question after the other, with thinking between them.

The first turns arrive as the load shape says, later ones when the answer before them has been
read: a partly open system (Schroeder, Wierman and Harchol-Balter, NSDI 2006). The history holds the
right answers, not the server's, so that every server is asked the same.
"""

from __future__ import annotations

from kvplug.loadtests.workloads.base import Materials, Session, Turn
from kvplug.loadtests.workloads.shared_prefix import questions


class MultiTurn:
    """A conversation a session."""

    name = "multi-turn"

    def session(self, number: int, materials: Materials) -> Session:
        """See :class:`Workload`."""
        prompts = questions(materials, "conversation", number, materials.turns)
        del materials.memory["conversation", number]  # no other session asks about it
        messages = prompts[0].messages()
        turns = []
        for place, prompt in enumerate(prompts):
            if place:
                messages = [
                    *messages,
                    {"role": "assistant", "content": prompts[place - 1].expected},
                    {"role": "user", "content": prompt.question},
                ]
            kind = "first turn" if place == 0 else "later turn"
            turns.append(Turn(messages, prompt.expected, kind, len(prompts[0].token_ids), {}))
        draw = materials.source("pauses", number)
        pause = materials.pause_s
        pauses = [draw.expovariate(1 / pause) if pause else 0.0 for _ in turns[1:]]
        return Session(number, turns, pauses)
