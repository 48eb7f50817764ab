"""A small Llama that was trained: attention that was learnt, beside the constructed model's.

Its weights come with kvplug, in ``trained/``, with the losses of their training;
``tools/train_small.py`` made them.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from kvplug.models.cache import cached_model, recipe_version
from kvplug.models.checkpoint import write_checkpoint

WEIGHTS = "trained/model.safetensors"
GEOMETRY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e9,
}


def build_trained_llama(directory: Path) -> Path:
    """Writes the model with its tokenizer into ``directory``.

    Returns:
        ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = load_file(Path(__file__).parent / WEIGHTS)
    # Stored once: the output reads the embedding.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return write_checkpoint(directory, tensors, GEOMETRY)


def trained_llama_path() -> Path:
    """The trained model's folder in the cache, built on the first call."""
    version = recipe_version("checkpoint.py", "trained_llama.py", WEIGHTS)
    return cached_model(f"trained-llama-{version}", build_trained_llama)
