"""Steps of several requests, as a scheduler would make them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.made_up import Piece


def schedule(prompts: dict[int, int], limit: int, decoded: int) -> Iterator[list[Piece]]:
    """Every request joins one step after the one before, and is decoded behind its prompt.

    Args:
        prompts: Tokens of each request's prompt.
        limit: Most tokens of a prompt in one step, in whole windows.
        decoded: Tokens that each request decodes.
    """
    known = dict.fromkeys(prompts, 0)
    number = 0
    while any(known[request] < prompts[request] + decoded for request in prompts):
        pieces = []
        for request in list(prompts)[: number + 1]:
            start, prompt = known[request], prompts[request]
            if start < prompt + decoded:
                tokens = min(limit, prompt - start) if start < prompt else 1
                pieces.append(Piece(request, start, tokens, start < prompt))
                known[request] += tokens
        number += 1
        if pieces:
            yield pieces
