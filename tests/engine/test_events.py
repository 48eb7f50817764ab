"""Surprise in a real engine: it finds planted boundaries."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvplug.models.glued import GluedDocument, glued_document
from tests.engine.forked import run_main

pytestmark = pytest.mark.engine
CONTEXT, PAGE, NEAR = 32_768, 32, 8
REPEATS = 1


@pytest.fixture(scope="module")
def document(tokenizer: Any) -> GluedDocument:
    """Some 240 passages of 40 to 240 tokens."""
    return glued_document(tokenizer, CONTEXT, seed=7)


@pytest.fixture(scope="module")
def served(recall_model: str, document: GluedDocument) -> dict[str, dict[str, Any]]:
    """The document, segmented by surprise, and for comparison uniformly, in the same chunks."""
    return {
        name: prefill(recall_model, document.token_ids, options)
        for name, options in {
            "surprise": {},
            "uniform": {"segment": "uniform"},
        }.items()
    }


def prefill(model: str, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """One engine's result; see ``event_child.py``."""
    spec = {
        "kvplug": {"policy": "emllm", "budget": 2048, "options": options},
        "engine": {
            "model": model, "block_size": PAGE, "max_model_len": CONTEXT + 64,
            "max_num_batched_tokens": 512,
        },
        "ids": ids, "repeats": REPEATS,
    }  # fmt: skip
    done = run_main("event_child", json.dumps(spec), seconds=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def f1(found: list[int], planted: list[int], near: int) -> float:
    """F1 of places found; each planted one is found once, by the first that is near enough."""
    left = list(planted)
    for place in found:
        hit = next((p for p in left if abs(p - place) <= near), None)
        if hit is not None:
            left.remove(hit)
    return 2 * (len(planted) - len(left)) / (len(found) + len(planted))


def test_f1_is_what_it_should_be() -> None:
    assert f1([10, 50], [12, 50], 8) == 1
    assert f1([10, 11, 50], [12, 50], 8) == pytest.approx(0.8)
    assert f1([10], [12, 50], 1) == 0


def test_planted_boundaries_are_found(served: Any, document: GluedDocument) -> None:
    found = served["surprise"]
    assert f1(found["boundaries"], document.seams, NEAR) >= 0.9
    edges = sorted({(seam + PAGE // 2) // PAGE for seam in document.seams})
    assert f1(found["starts"], edges, 0) >= 0.9
    assert served["uniform"]["boundaries"] == []
