"""A random Llama with an honest share of MLP work: for speed, and for equality of tokens.

The recall model's layers cost next to nothing besides attention, which flatters anything that
saves attention. This one has the shape of a small real model; what it says is noise.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kvplug.models.cache import cached_model, recipe_version
from kvplug.models.checkpoint import write_checkpoint
from kvplug.models.tokenizer import vocabulary

SEED = 0
STD = 0.02  # Llama's initializer_range
GEOMETRY = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 163_840,
    "rope_theta": 1e6,
}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order in which they are drawn."""
    size = {name: int(value) for name, value in GEOMETRY.items()}
    hidden, inner, vocab = size["hidden_size"], size["intermediate_size"], len(vocabulary())
    queries = size["num_attention_heads"] * size["head_dim"]
    keys = size["num_key_value_heads"] * size["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(size["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def build_random_llama(directory: Path) -> Path:
    """Writes the random model with its tokenizer into `directory`, about 190 MB.

    Returns:
        `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(STD).to(torch.bfloat16)
        for name, shape in _shapes().items()
    }
    return write_checkpoint(directory, tensors, GEOMETRY)


def random_llama_path() -> Path:
    """The random model's folder in the cache, built on the first call."""
    version = recipe_version("checkpoint.py", "random_llama.py")
    return cached_model(f"random-llama-{version}", build_random_llama)
