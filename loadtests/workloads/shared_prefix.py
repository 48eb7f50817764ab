"""Many questions about few documents: what a prefix cache is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.loadtests.workloads.base import Materials, Session, Turn

if TYPE_CHECKING:
    from kvplug.models.documents import NeedlePrompt

MOST_QUESTIONS = 64
"""About one document; then they come again, and hit the cache whole."""
TOKENS_PER_QUESTION = 100
"""Of a document, at least."""


class SharedPrefix:
    """Requests take the documents in turn, and each asks another question."""

    name = "shared-prefix"

    def session(self, number: int, materials: Materials) -> Session:
        """See :class:`Workload`."""
        which, serial = number % materials.documents, number // materials.documents
        asked = questions(materials, "shared", which, MOST_QUESTIONS)
        prompt = asked[serial % len(asked)]
        context = len(prompt.token_ids)
        turn = Turn(prompt.messages(), prompt.expected, "shared prefix", context, {})
        return Session(number, [turn], [])


def questions(materials: Materials, purpose: str, which: int, most: int) -> list[NeedlePrompt]:
    """Questions about a document, the same each time.

    Args:
        materials: What it is made of.
        purpose: Of the document.
        which: Document of that purpose.
        most: Questions, where it is long enough for as many.
    """
    from kvplug.models.documents import needle_questions

    key = (purpose, which)
    if key not in materials.memory:
        draw = materials.source(*key)
        tokens = materials.lengths.draw(draw)
        count = min(most, max(1, tokens // TOKENS_PER_QUESTION))
        seed = draw.randrange(2**31)
        materials.memory[key] = needle_questions(materials.tokenizer, tokens, count, seed)
    found: list[NeedlePrompt] = materials.memory[key]
    return found
