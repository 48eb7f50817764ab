"""Writes a Llama checkpoint: tensors in bf16, config, generation config and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvplug.models.tokenizer import BEGIN, END, PAD, save_tokenizer, vocabulary


def write_checkpoint(
    directory: Path, tensors: Mapping[str, torch.Tensor], geometry: Mapping[str, float]
) -> Path:
    """Writes everything that transformers and vLLM load from a folder.

    Args:
        directory: Existing folder.
        tensors: Name -> value, under the names of `LlamaForCausalLM`; stored in bf16.
        geometry: `rope_theta` and the sizes of `LlamaConfig`; the vocabulary is the tokenizer's.

    Returns:
        `directory`.
    """
    tokens = vocabulary()
    special = {
        "bos_token_id": tokens.index(BEGIN),
        "eos_token_id": tokens.index(END),
        "pad_token_id": tokens.index(PAD),
    }
    sizes = dict(geometry)
    rope = {"rope_type": "default", "rope_theta": float(sizes.pop("rope_theta"))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        "vocab_size": len(tokens),
        **special,
        **sizes,
    }
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {**special, "do_sample": False}),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_tokenizer(directory)
    return directory
