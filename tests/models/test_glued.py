"""Glued documents: exact lengths, passages that repeat themselves, seams where they are."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.models.glued import CYCLE, GENERATORS, LONGEST, SHORTEST, glued_document


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from kvplug.models.recall import recall_model_path

    return AutoTokenizer.from_pretrained(recall_model_path())


@pytest.mark.parametrize("tokens", [1, 500, 8192])
def test_is_as_long_as_asked_for(tokenizer: Any, tokens: int) -> None:
    assert len(glued_document(tokenizer, tokens, seed=0).token_ids) == tokens


def test_passages_repeat_themselves_and_differ_at_seams(tokenizer: Any) -> None:
    document = glued_document(tokenizer, 8192, seed=1)
    ids, ends = document.token_ids, [*document.seams, 8192]
    assert set(document.kinds) == set(GENERATORS)
    assert len(document.kinds) == len(ends)
    begin, cycles = 0, set()
    for kind, end in zip(document.kinds, ends, strict=True):
        period = 3 if kind == "calling" else 4
        assert period <= CYCLE
        passage = ids[begin:end]
        assert passage[period:] == passage[:-period]
        assert len(set(passage[:period])) == period
        assert tokenizer.unk_token_id not in passage
        assert end == 8192 or SHORTEST <= len(passage) <= LONGEST
        cycles.add(tuple(passage[:period]))
        begin = end
    assert len(cycles) == len(ends)


def test_same_seed_same_document(tokenizer: Any) -> None:
    first = glued_document(tokenizer, 700, seed=5)
    assert first == glued_document(tokenizer, 700, seed=5)
    assert first.token_ids != glued_document(tokenizer, 700, seed=6).token_ids
