"""The trained model loads like any checkpoint, fits its size, and recalls from short texts."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvplug.evals.haystack import Noise, Prose
from kvplug.evals.metrics import METRICS
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.base import Materials
from kvplug.evals.wording import Wording
from kvplug.models import trained_llama
from kvplug.models.trained_llama import GEOMETRY, trained_llama_path

FOLDER = Path(trained_llama.__file__).parent / "trained"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(trained_llama_path(), dtype=torch.bfloat16).eval()


def test_its_weights_are_small_and_their_training_is_told() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20
    told = json.loads((FOLDER / "training.json").read_text())
    assert told["seed"] == 0
    assert told["seconds"] > 0
    assert sum(phase["steps"] for phase in told["phases"]) == told["steps"]
    rows = list(csv.DictReader((FOLDER / "losses.csv").open()))
    losses = [float(row["recalled"]) for row in rows if row["recalled"] != "nan"]
    assert sum(losses[-10:]) < sum(losses[:10]) / 5


def test_shape_and_tied_weights(model: Any) -> None:
    config = model.config
    assert config.num_hidden_layers == GEOMETRY["num_hidden_layers"]
    assert config.head_dim == GEOMETRY["head_dim"]
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["niah_single_1", "passkey", "mqar"])
def test_it_recalls(model: Any, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_llama_path())
    materials = Materials(Noise(), Prose(), Wording(plain=True))
    task, scores = TASKS.get(name), []
    for seed in range(8):
        example = task.make(random.Random(seed), 40, materials)
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        scores.append(METRICS[task.metric](tokenizer.decode(out), example))
    assert sum(scores) >= 6
