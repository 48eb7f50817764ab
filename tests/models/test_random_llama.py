"""The random model's shape; its 190 MB are built where a benchmark asks for them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvplug.models import random_llama
from kvplug.models.tokenizer import vocabulary


def test_tensors_are_those_of_llama() -> None:
    sizes = {name: value for name, value in random_llama.GEOMETRY.items() if name != "rope_theta"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary()), **sizes))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert random_llama._shapes() == expected
