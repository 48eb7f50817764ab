"""Needle prompts: exact length, the key once, and the same again for the same seed."""

from __future__ import annotations

import pytest

from kvplug.models.documents import needle_prompt, needle_questions, random_tokens
from kvplug.models.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("length", [100, 101, 1000, 4096, 16_385])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_length_is_exact_and_the_key_unique(length: int, depth: float) -> None:
    prompt = needle_prompt(TOKENIZER, length, depth, seed=length)
    ids = prompt.token_ids
    assert len(ids) == length
    rendered = TOKENIZER.apply_chat_template(prompt.messages(), add_generation_prompt=True)
    assert rendered["input_ids"] == ids
    key = ids[-4:]
    places = [i for i in range(length - 4) if ids[i : i + 4] == key]
    assert len(places) == 1
    answer = TOKENIZER.decode(ids[places[0] + 4 : places[0] + 8])
    assert answer == prompt.expected
    # One sentence (24 tokens at most) of slack.
    assert abs(places[0] - depth * (length - 40)) < 40


def test_every_key_is_unique_among_many_needles() -> None:
    prompt = needle_prompt(TOKENIZER, 8192, 0.5, seed=1, needles=32)
    assert prompt.document.count(" is ") == 32
    assert len(prompt.token_ids) == 8192
    subject = prompt.question.removeprefix("What is ").removesuffix("?")
    sentence = f"{subject} is {prompt.expected}"
    assert sentence[0].upper() + sentence[1:] in prompt.document


def test_same_seed_same_prompt() -> None:
    first, again, other = (needle_prompt(TOKENIZER, 500, 0.5, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("tokens", "depth", "message"),
    [(30, 0.5, r"need \d+ tokens or more"), (500, 1.5, "between 0.0 and 1.0")],
)
def test_impossible_prompts_are_refused(tokens: int, depth: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle_prompt(TOKENIZER, tokens, depth, seed=0)


def test_random_tokens_are_words() -> None:
    ids = random_tokens(TOKENIZER, 1000, seed=3)
    assert ids == random_tokens(TOKENIZER, 1000, seed=3)
    assert len(ids) == 1000
    assert all(token.isalpha() for token in TOKENIZER.convert_ids_to_tokens(ids))


def test_questions_share_a_document():
    prompts = needle_questions(TOKENIZER, 3000, 12, seed=5)
    assert len({prompt.question for prompt in prompts}) == 12
    for prompt in prompts:
        text = TOKENIZER.apply_chat_template(
            prompt.messages(), tokenize=False, add_generation_prompt=True
        )
        assert prompt.token_ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert len(prompt.token_ids) == 3000
        assert f"{prompt.question[8:-1]} is {prompt.expected}" in prompt.document.lower()
