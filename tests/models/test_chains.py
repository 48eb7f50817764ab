"""Chains: every word of the answer follows from one place, and no two of them are neighbours."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from kvplug.models.chains import COPIES, KNOWN, chain_prompt
from kvplug.models.recall import recall_model_path


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(recall_model_path()))


@pytest.mark.parametrize(("length", "links"), [(800, 8), (4000, 64)])
def test_the_answer_follows_word_by_word(tokenizer, length: int, links: int) -> None:
    prompt, answer = chain_prompt(tokenizer, length, links, seed=3)
    assert len(prompt) == length
    assert len(answer) == links == len(set(answer))
    text, places = list(prompt), []
    for word in answer:
        key = text[-KNOWN:]
        found = [i for i in range(length - KNOWN) if prompt[i : i + KNOWN] == key]
        followers = Counter(prompt[i + KNOWN] for i in found)
        assert followers.pop(word) == COPIES
        assert all(count == 1 for count in followers.values())
        places.append(next(i for i in found if prompt[i + KNOWN] == word))
        text.append(word)
    steps = [abs(a - b) for a, b in pairwise(places)]
    assert min(steps) > KNOWN
    assert sum(steps) / len(steps) > length / 6, "as far apart as chance puts them"


def test_seeds(tokenizer) -> None:
    assert chain_prompt(tokenizer, 500, 8, 1) == chain_prompt(tokenizer, 500, 8, 1)
    assert chain_prompt(tokenizer, 500, 8, 1) != chain_prompt(tokenizer, 500, 8, 2)


@pytest.mark.parametrize(("length", "links"), [(60, 16), (10_000, 5_000)])
def test_what_does_not_fit_is_refused(tokenizer, length: int, links: int) -> None:
    with pytest.raises(ValueError, match="links need more"):
        chain_prompt(tokenizer, length, links, 0)
