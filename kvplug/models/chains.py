"""Chain prompts: every word of the answer stands somewhere else in the document.

The recall model says what followed the last four words where they stood before. A chain of words
is cut into pieces of five that overlap by four, and the pieces are strewn over a document in random
order: the model then says the chain, and finds each next word in another place. What one decoded
token asks for says nothing about what the next one will.

Where a piece ends, its last four words are those that the next piece begins with, so they stand
before some word of the filler too. Every piece is there twice: the word that follows twice wins
over two that follow once.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from kvplug.models.words import all_words

KNOWN = 4
"""Words by which the recall model finds what comes next."""
COPIES = 2
"""Of each piece."""


def chain_prompt(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, links: int, seed: int
) -> tuple[list[int], list[int]]:
    """A document with a chain in it, and its first words at the end.

    Args:
        tokenizer: The bundled models' tokenizer.
        context_tokens: Length of the prompt, exactly.
        links: Words of the answer.
        seed: Same seed, same prompt.

    Returns:
        The prompt's token ids; those of the answer, ``links`` of them.

    Raises:
        ValueError: The prompt is too short, or the vocabulary too small, for so many links.
    """
    draw = random.Random(f"chain {seed}")
    ids = tokenizer.convert_tokens_to_ids(all_words())
    if KNOWN + links > len(ids) // 2:
        raise ValueError(f"{links} links need more words than there are")
    draw.shuffle(ids)
    chain, filler = ids[: KNOWN + links], ids[KNOWN + links :]
    pieces = COPIES * [chain[i : i + KNOWN + 1] for i in range(links)]
    draw.shuffle(pieces)
    room = context_tokens - KNOWN - len(pieces) * (KNOWN + 1)
    if room <= len(pieces):
        raise ValueError(f"{links} links need more than {context_tokens} tokens")
    # Places in the filler, apart from each other: no piece touches another.
    places = sorted(draw.sample(range(1, room), len(pieces)))
    prompt: list[int] = []
    begin = 0
    for place, piece in zip(places, pieces, strict=True):
        prompt += draw.choices(filler, k=place - begin) + piece
        begin = place
    prompt += draw.choices(filler, k=room - begin) + chain[:KNOWN]
    return prompt, chain[KNOWN:]
