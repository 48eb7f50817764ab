"""One engine over all budgets: what is switched and dropped between cells, what counts.

The engine is a stand-in: it answers with fixed tokens and notes what it is asked in which state.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvplug.bench import sweep as module
from kvplug.bench.job import Job
from kvplug.bench.sweep import Sweep, SweepBench
from kvplug.exact_mass import Mass
from kvplug.pipeline import Pipeline
from tests.cases import PolicyCase
from tests.made_up import World, reader_of

CONTEXTS = [600, 70_000]
WORDS = ["red", " dog", " one", ".", "<end>", "x"]
ANSWER = "red dog one."


def sweep(**changed: Any) -> Sweep:
    job = Job("quest", "recall", CONTEXTS, [1], 3, 8, 4096, 64, True, 1, {"budget": 32})
    return Sweep(**{"job": job, "budgets": [32, 64], "needles": [20, 10], "mass_questions": 4,
                    **changed})  # fmt: skip


class Engine:
    """Stands in for Bench: prompts are ``[number, ...]``; ``wrong`` ones are answered badly."""

    def __init__(self, pipeline: Pipeline | None) -> None:
        self.pipeline, self.engine = pipeline, self
        self.log: list[tuple[str, Any]] = []
        self.wrong: dict[int, int] = {}
        """Prompt -> its first wrong word."""
        self.layers: list[Any] = []

    def retrieving_layers(self) -> list[Any]:
        return self.layers

    def reset_prefix_cache(self) -> bool:
        self.log.append(("reset", None))
        return True

    def run(
        self, prompts: list[list[int]], decoded: int, salt: str | None
    ) -> tuple[list[float], list[float], list[list[int]]]:
        assert salt is None
        numbers = [prompt[0] for prompt in prompts]
        budget = self.pipeline.geometry.budget_pages if self.pipeline else 0
        self.log.append(("run", (numbers, len(prompts[0]), decoded, budget)))
        tokens = []
        for number in numbers:
            bad = self.wrong.get(number, len(WORDS))
            tokens.append([i if i < bad else 5 for i in range(decoded)])
        return [0.5] * len(prompts), [0.1, 0.2, 0.9], tokens

    def answers(self, ids: list[int], expected: str) -> bool:
        return decode(ids).startswith(expected)


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] if i < len(WORDS) else "" for i in ids)


class Layer:
    """An attention layer whose observer is called by hand."""

    def __init__(self, world: World, stages: Any) -> None:
        self.kv_cache = torch.zeros(world.num_pages, world.num_kv_heads, world.page, 2)
        self.impl = SimpleNamespace(
            pipeline=world.pipeline, stages=stages, cache=None, scale=1.0,
            logits_soft_cap=0.0, observer=None, fixed=None,
            attend=SimpleNamespace(reader=lambda _: "reader"),
        )  # fmt: skip


def bench(monkeypatch: pytest.MonkeyPatch, of: Sweep, layers: int = 2) -> tuple[SweepBench, Engine]:
    """A bench over a stand-in engine with real stages."""
    world = World(PolicyCase("quest", {}), {"budget": 8, "window": 16, "dense_below": 0})
    monkeypatch.setattr(
        module, "Document",
        lambda job, context, needles: SimpleNamespace(
            prompts=[[number] * context for number in range(needles)],
            answers=[ANSWER] * needles, tokenizer=SimpleNamespace(decode=decode),
        ),
    )  # fmt: skip
    engine = Engine(world.pipeline if layers else None)
    monkeypatch.setattr(module, "Bench", lambda job: engine)
    assert world.layer is not None
    for _ in range(1, layers):
        world.pipeline.make_layer(world.layer.index.shape, reader_of(world.cache))
    engine.layers = [Layer(world, stages) for stages in world.pipeline.layers[:layers]]
    return SweepBench(of), engine


def test_json_round_trip() -> None:
    assert Sweep.from_json(sweep().to_json()) == sweep()


def test_every_cell_has_its_budget_and_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed request prefills cold; questions come after it, without a reset between."""
    made, engine = bench(monkeypatch, sweep(mass_questions=0))
    cells = list(made.cells())
    assert [(cell["context_tokens"], cell["budget_tokens"]) for cell in cells] == [
        (600, 32), (600, 64), (70_000, 32), (70_000, 64),
    ]  # fmt: skip
    log = engine.log[1:]  # behind the warm-up
    timed = [("reset", None)], [("run", ([0], 600, 64, 4))]
    batches = [list(range(i, min(i + 8, 20))) for i in (0, 8, 16)]
    asked = [("run", (numbers, 600, 6, 4)) for numbers in batches]
    assert log[: 6 + 3] == [*(timed[0] + timed[1]) * 3, *asked]
    # Long contexts are timed once.
    resets = [i for i, (what, _) in enumerate(log) if what == "reset"]
    assert len(resets) == 3 + 3 + 1 + 1
    assert [log[i + 1][1][3] for i in resets] == [4, 4, 4, 8, 8, 8, 4, 8]


def test_figures_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    made, engine = bench(monkeypatch, sweep(mass_questions=0))
    engine.wrong = {3: 0, 7: 2, 19: 3, 9: 4}  # the last errs behind the answer
    cell = next(made.cells())
    assert (cell["needles"], cell["recalled"]) == (20, 17)
    assert cell["ttft_s"] == 0.5
    assert cell["decode_tok_s"] == pytest.approx(5.0)
    assert cell["mass"] is None
    # Two layers of the same kind: bounds of 16 + 16 numbers, 2 bytes each, 3 heads, pages of 8.
    assert cell["index_bytes_per_token"] == made.layers[0].impl.stages.index.bytes_per_token()


def test_stock_vllm_has_neither_mass_nor_index(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = bench(monkeypatch, sweep(budgets=[0], mass_questions=0), layers=0)
    cell = next(made.cells())
    assert (cell["mass"], cell["index_bytes_per_token"]) == (None, None)
    assert (cell["needles"], cell["recalled"]) == (20, 20)


def test_what_counts_as_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows up to the first wrong word, questions alike, layers apart; no observer stays."""
    made, engine = bench(monkeypatch, sweep(needles=[20, 10]))
    shares = {  # question -> per layer, of the prompt's last token and each decoded one
        2: ([1.0] * 5, [1.0, 1.0, 0.5, 1.0, 1.0]),
        7: ([1.0] * 5, [0.0, 0.9, 0.9, 0.9, 0.9]),
        12: ([1.0] * 5, [1.0, 0.2, 0.9, 0.9, 0.9]),
        17: ([1.0] * 5, [1.0] * 5),
    }
    engine.wrong = {7: 0, 12: 1}
    original = engine.run

    def run(prompts: list[list[int]], decoded: int, salt: str | None) -> Any:
        for layer, values in zip(made.layers, shares.get(prompts[0][0], ((), ())), strict=True):
            if layer.impl.observer is not None:
                assert layer.impl.observer.since == 600
                layer.impl.observer.measured = [Mass(value, 1.0) for value in values]
        return original(prompts, decoded, salt)

    monkeypatch.setattr(engine, "run", run)
    cell = next(made.cells())
    second = (4.5 / 5 + 0.0 + 1.2 / 2 + 1.0) / 4
    assert cell["mass_by_layer"] == pytest.approx([1.0, second])
    assert cell["mass"] == pytest.approx((1 + second) / 2)
    assert cell["best_mass"] == 1.0
    assert all(layer.impl.observer is None for layer in made.layers)


def test_dense_windows_have_no_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = bench(monkeypatch, sweep())
    assert next(made.cells())["mass"] is None


def test_a_cache_that_is_not_dropped_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made, engine = bench(monkeypatch, sweep())
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="did not drop"):
        next(made.cells())
