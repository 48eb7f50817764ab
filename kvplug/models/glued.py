"""Documents glued from passages of several generators, each of which says a few words for ever.

The recall model expects whatever followed the last four tokens when they stood there before. Within
a passage that is what comes, once its words have been said; at a seam nothing that it knows comes,
until the new passage begins to repeat itself. So the seams are the surprising places, and what a
segmenter of events should find.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvplug.models.words import word_sections

CYCLE = 4
"""Most words of a passage before it repeats itself: the model is surprised for these and the next
four, which is as long as the shortest event."""
SHORTEST, LONGEST = 40, 240
"""Tokens of a passage; the last of a document may be shorter."""


@dataclass(frozen=True)
class GluedDocument:
    """A document whose parts are known.

    Attributes:
        token_ids: The document; no template, no question.
        seams: Position of the first token of every passage but the first.
        kinds: Name of each passage's generator.
    """

    token_ids: list[int]
    seams: list[int]
    kinds: list[str]


def glued_document(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> GluedDocument:
    """Glues passages to a document.

    Args:
        tokenizer: The bundled models' tokenizer.
        tokens: Length of the document, exactly.
        seed: Same seed, same document.
    """
    draw = random.Random(f"glued {seed}")
    said: set[tuple[str, ...]] = set()
    words: list[str] = []
    seams: list[int] = []
    kinds: list[str] = []
    while len(words) < tokens:
        kind = draw.choice([name for name in GENERATORS if name not in kinds[-1:]])
        cycle = GENERATORS[kind](draw)
        if cycle in said or len(set(cycle)) < len(cycle):
            continue
        said.add(cycle)
        length = min(draw.randint(SHORTEST, LONGEST), tokens - len(words))
        seams += [len(words)] if words else []
        kinds.append(kind)
        words += [cycle[i % len(cycle)] for i in range(length)]
    return GluedDocument(tokenizer.convert_tokens_to_ids(words), seams, kinds)


def _counting(draw: random.Random) -> tuple[str, ...]:
    """Numbers in order."""
    numbers = word_sections()["numbers"]
    first = draw.randrange(len(numbers) - CYCLE)
    return numbers[first : first + CYCLE]


def _listing(draw: random.Random) -> tuple[str, ...]:
    """Two things to get, with their colours."""
    colors, nouns = word_sections()["colors"], word_sections()["nouns"]
    return (draw.choice(colors), draw.choice(nouns), draw.choice(colors), draw.choice(nouns))


def _refrain(draw: random.Random) -> tuple[str, ...]:
    """Who does what."""
    words = word_sections()
    sections = ("adverbs", "names", "transitive verbs", "places")
    return tuple(draw.choice(words[section]) for section in sections)


def _calling(draw: random.Random) -> tuple[str, ...]:
    """A name, called out."""
    return (draw.choice(word_sections()["names"]), draw.choice(word_sections()["names"]), ",")


GENERATORS: dict[str, Callable[[random.Random], tuple[str, ...]]] = {
    "counting": _counting,
    "listing": _listing,
    "refrain": _refrain,
    "calling": _calling,
}
"""Draws the words that a passage repeats, all different, by the passage's kind."""
