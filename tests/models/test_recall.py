"""The recall model finds needles through transformers' own Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kvplug.models.documents import needle_prompt, random_tokens
from kvplug.models.recall import SHORT_THETA, build_recall_model


def loaded(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Tokenizer]:
    return loaded(build_recall_model(tmp_path_factory.mktemp("recall")))


@pytest.mark.parametrize(("length", "knows"), [(400, True), (1000, False), (3000, False)])
def test_the_short_model_knows_short_contexts(length: int, knows: bool, tmp_path: Path) -> None:
    """Past some hundred tokens it says nothing of what it was asked."""
    model, tokenizer = loaded(build_recall_model(tmp_path, SHORT_THETA))
    prompt = needle_prompt(tokenizer, length, 0.1, seed=length)
    output = model.generate(torch.tensor([prompt.token_ids]), max_new_tokens=4)[0]
    answer = tokenizer.decode(output[length:])
    first = prompt.expected.split()[0]
    assert (first in answer) == knows


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("length", "needles"), [(2048, 1), (4096, 8)])
def test_answer_is_exact_and_ends(
    recall: tuple[PreTrainedModel, Tokenizer], length: int, needles: int, depth: float
) -> None:
    model, tokenizer = recall
    prompt = needle_prompt(tokenizer, length, depth, seed=length, needles=needles)
    output = model.generate(torch.tensor([prompt.token_ids]), max_new_tokens=16)[0]
    answer = output[length:].tolist()
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == prompt.expected


@pytest.mark.parametrize("seed", [0, 1])
def test_continues_random_tokens(recall: tuple[PreTrainedModel, Tokenizer], seed: int) -> None:
    model, tokenizer = recall
    tokens = random_tokens(tokenizer, 1500, seed=seed)
    prompt = [tokenizer.bos_token_id, *tokens, *tokens[700:710]]
    output = model.generate(torch.tensor([prompt]), max_new_tokens=32)[0]
    assert output[len(prompt) :].tolist() == tokens[710:742]


def test_logits_are_decisive(recall: tuple[PreTrainedModel, Tokenizer]) -> None:
    model, tokenizer = recall
    prompt = needle_prompt(tokenizer, 1024, 0.5, seed=4)
    with torch.no_grad():
        logits = model(torch.tensor([prompt.token_ids])).logits[0, -1].float()
    assert tokenizer.decode(logits.argmax()) == prompt.expected.split()[0]
    best, second = logits.topk(2).values
    assert best - second > 25
