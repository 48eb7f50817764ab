"""Entropy budget: layers share the total by density, and nothing but the prompt's densities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.budget.density import LayerDensity, density_reference
from kvplug.budget.entropy import LEAST, share_out, share_out_reference
from kvplug.errors import KvplugError
from kvplug.layer_stages import LayerStages
from kvplug.pipeline import Pipeline, Plan
from kvplug.policies import check
from tests.cases import PolicyCase
from tests.made_up import Attended, Piece, World, layer_shape, reader_of

PAGE, WINDOW, BUDGET, HEADS = 8, 32, 6, 3
BLOCK = WINDOW // PAGE
OPTIONS = {
    "sink": 10, "local": 20, "budget": BUDGET * PAGE, "window": WINDOW, "dense_below": 100,
}  # fmt: skip
Found = dict[tuple[int, int], Attended | None]
DENSITY = st.floats(0, 1, width=32)


def shares(densities: list[float], pages: int, num_far: int) -> list[int]:
    """Pages of every layer."""
    means = np.array([[density, 3] for density in densities], np.float32)
    return [int(share_out(means, rank, pages, num_far)) for rank in range(len(densities))]


@given(
    st.lists(DENSITY, min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 300),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_shares(densities: list[float], pages: int, more: int) -> None:
    """The definition; no layer is starved, and the total stays within the budget."""
    densities = [float(np.float32(density)) for density in densities]
    found = shares(densities, pages, pages + more)
    assert found == share_out_reference(densities, pages, pages + more)
    assert sum(found) <= len(densities) * pages
    assert min(found) >= max(min(LEAST, pages // 2), 1)
    assert max(found) <= min(2 * pages, pages + more)


@given(
    st.lists(DENSITY, min_size=1, max_size=30), st.integers(1, 200), DENSITY, st.data(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_a_higher_density_never_gets_less(
    densities: list[float], pages: int, other: float, data: st.DataObject
) -> None:
    """But for the one page that the rounding of earlier layers moves."""
    layer = data.draw(st.integers(0, len(densities) - 1))
    low, high = sorted([densities[layer], other])
    changed = [[*densities[:layer], value, *densities[layer + 1 :]] for value in (low, high)]
    less, more = (shares(values, pages, 2 * pages)[layer] for values in changed)
    assert less <= more + (layer > 0)


@pytest.mark.parametrize(
    ("densities", "pages", "expected"),
    [
        pytest.param([0.5], 64, [64], id="one layer"),
        pytest.param([0.0], 64, [64], id="one layer that is certain"),
        pytest.param([0.7] * 5, 64, [64] * 5, id="all alike"),
        pytest.param([0.0] * 4, 7, [7] * 4, id="all certain"),
        pytest.param([0.9, 0.6], 64, [77, 51], id="in proportion"),
        pytest.param([0.9, 0.0], 64, [96, 32], id="the last keeps the least"),
        pytest.param([0.0, 0.9], 64, [32, 96], id="the first keeps the least"),
        pytest.param([0.9, 0.0], 23, [35, 11], id="the least is half of a small budget"),
        pytest.param([1.0, 0.1, 0.1, 0.1], 100, [200, 67, 67, 66], id="twice the budget at most"),
        pytest.param([1.0, 0.0, 0.0], 1, [1, 1, 1], id="one page"),
    ],
)
def test_shares_by_hand(densities: list[float], pages: int, expected: list[int]) -> None:
    assert shares(densities, pages, 10_000) == expected


def test_a_layer_that_saw_nothing_leaves_all_alike() -> None:
    means = np.array([[0.9, 4], [0.1, 0], [0.5, 4]], np.float32)
    assert [int(share_out(means, rank, 64, 999)) for rank in range(3)] == [64] * 3


class Layers(World):
    """Two layers: one whose queries match nothing, and one whose queries ask for one page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pipeline = Pipeline(self.config, self.page, self.num_kv_heads)
        shapes = [
            layer_shape(
                num_pages=self.num_pages, num_kv_heads=HEADS, page=self.page, num_heads=6,
                window=self.config.window, num_layers=2, rank=rank, layer=rank,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        made = [self.pipeline.make_layer(shape, reader_of(self.cache)) for shape in shapes]
        self.layers = [layer for layer in made if layer is not None]
        self.layer = self.layers[0]
        self.found: list[Found] = [{}, {}]
        self.broken = False

    def plan(self, pieces: Sequence[Piece], *, cached: bool = True) -> Plan | None:
        """Writes the step's keys to both layers and plans it; earlier steps came before."""
        assert not cached
        plan = super().plan(pieces, cached=False)
        if plan is None:
            self.pipeline.pass_by(self.layers[1], self.queries(pieces), self.new_keys(pieces))
        return plan

    def attend(self, pieces: Sequence[Piece], plan: Plan, sign: float = 1.0) -> None:
        """Runs both layers and keeps what each attends to."""
        keys = torch.cat([self.keys(p.request)[p.start : p.stop] for p in pieces])
        diffuse = self.queries(pieces)
        wanted = [self.keys(p.request)[70].expand(p.tokens, -1, -1) for p in pieces]
        sharp = torch.cat(wanted).repeat_interleave(2, 1) + 0.01 * diffuse
        if self.broken:
            sharp = torch.full_like(sharp, float("nan"))
        for layer, queries, found in zip(self.layers, (diffuse, sharp), self.found, strict=True):
            self.pipeline.run(layer, queries, keys, plan)
            if plan.table is not None:
                found.update(self.read(pieces, plan))

    def numbers(self, request: int, position: int) -> list[int]:
        """Far pages of each layer at a position; the same for all heads."""
        numbers = []
        for found in self.found:
            attended = found[request, position]
            assert attended is not None
            fixed = 2 + -(-attended.end // PAGE) - max(attended.first + 1 - 20, 0) // PAGE
            (length,) = {len(row) for row in attended.pages}
            numbers.append(length - fixed)
        return numbers

    def states(self, request: int, stop: int) -> torch.Tensor:
        """``[windows, L, 2]``: what every window of a request says of the layers."""
        memory = density_of(self.layers[0]).all
        opening = self.pages_of[request][: -(-stop // PAGE) : BLOCK]
        closing = self.pages_of[request][BLOCK - 1 : stop // PAGE : BLOCK]
        whole = stop // WINDOW
        return memory.means[closing[:whole] + opening[whole:]]


def density_of(layer: LayerStages) -> LayerDensity:
    return next(m for m in layer.memories if isinstance(m, LayerDensity))


def layers(shuffle: int = 0, dirt: float = 0.0, index: str = "simhash") -> Layers:
    case = PolicyCase("simhash", {"index": index, "probe": "activation", "budget": "entropy"})
    made = Layers(case, OPTIONS, PAGE, shuffle=shuffle)
    density_of(made.layers[0]).all.means.fill_(dirt)
    return made


PROMPT = 611


def test_layers_get_what_they_need_and_no_more_together() -> None:
    """The one that knows what it wants attends to fewer pages, whose rows are as much shorter."""
    made = layers()
    made.prefill(1, PROMPT)
    for position in range(PROMPT, PROMPT + 40):
        made.run([Piece(1, position, 1, False)], cached=False)
        diffuse, sharp = made.numbers(1, position)
        assert sharp < BUDGET < diffuse
        assert sharp + diffuse <= 2 * BUDGET
        assert sharp >= BUDGET // 2
        attended = made.found[1][1, position]
        assert attended is not None
        assert all(70 // PAGE in row for row in attended.pages)


def test_prompts_get_the_same_in_all_layers() -> None:
    made = layers()
    made.prefill(1, PROMPT)
    windows = [key for key, attended in made.found[0].items() if attended is not None]
    assert len(windows) > 400
    for request, position in windows:
        assert made.numbers(request, position) == [BUDGET, BUDGET]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_formula_from_end_to_end(temperature: float, monkeypatch: Any) -> None:
    """Mean over sparse windows and heads of the scores' densities, then the shares."""
    seen: list[list[torch.Tensor]] = [[], []]
    real = LayerDensity.learn

    def learn(self: LayerDensity, scores: torch.Tensor, step: Any, *rest: Any) -> None:
        real(self, scores, step, *rest)
        for w, row in enumerate(step.sparse_windows):
            pages = int(step.windows.far_end[row] - step.windows.far_begin[row])
            seen[self.shape.rank].append(scores[w, :, :pages].clone())

    monkeypatch.setattr(LayerDensity, "learn", learn)
    case = PolicyCase("simhash", {"budget": {"name": "entropy", "temperature": temperature}})
    made = Layers(case, OPTIONS, PAGE)
    made.prefill(1, PROMPT, 4 * WINDOW)
    means = [
        float(torch.stack([density_reference(s, temperature).mean() for s in rows]).mean())
        for rows in seen
    ]
    prompt = [len(rows) for rows in seen]
    made.run([Piece(1, PROMPT, 1, False)], cached=False)
    num_far = len(range(2, (PROMPT + 1 - 20) // PAGE))
    assert made.numbers(1, PROMPT) == share_out_reference(means, BUDGET, num_far)
    assert torch.allclose(made.states(1, PROMPT)[-1, :, 0], torch.tensor(means), atol=1e-5)
    assert made.states(1, PROMPT)[-1, :, 1].tolist() == prompt


@pytest.mark.parametrize("limit", [WINDOW, 64, 256])
def test_chunks_batch_and_pages_do_not_matter(limit: int) -> None:
    """Densities bit for bit, selections too; nor does what pages held before."""
    once, other = layers(), layers(shuffle=3, dirt=0.123)
    once.prefill(1, PROMPT, 640)
    other.prefill(2, 300)
    for start in range(0, PROMPT, limit):
        tokens = min(limit, PROMPT - start)
        batch = [Piece(2, 300 + start // limit, 1, False), Piece(1, start, tokens, True)]
        other.run(batch, cached=False)
    once.run([Piece(1, PROMPT, 1, False)], cached=False)
    other.run([Piece(2, 400, 1, False), Piece(1, PROMPT, 1, False)], cached=False)
    assert torch.equal(once.states(1, PROMPT), other.states(1, PROMPT))
    for mine, theirs in zip(once.found, other.found, strict=True):
        assert mine.items() <= theirs.items()


@pytest.mark.parametrize("prompt", [256, PROMPT])
def test_replay_is_as_decoded(prompt: int) -> None:
    """Over several blocks at once: the first layer must not need what later ones have yet to say.

    The first block to be decoded may be a new one (256) or the prompt's last (611).
    """
    made, again = layers(dirt=0.5), layers(shuffle=3, dirt=0.321)
    made.prefill(1, prompt)
    for position in range(prompt, prompt + 50):
        made.run([Piece(1, position, 1, False)], cached=False)
    again.prefill(1, prompt)
    again.run([Piece(1, prompt, 50, False)], cached=False)
    assert again.found == made.found
    assert torch.equal(again.states(1, prompt + 50), made.states(1, prompt + 50))
    assert {tuple(made.numbers(1, p)) for p in range(prompt, prompt + 50)} != {(BUDGET, BUDGET)}


def test_a_prefix_hit_is_as_good_as_a_cold_run() -> None:
    """Though another request went on from the prefix in another way, on pages of its own."""
    cold, made = layers(), layers(shuffle=1)
    cold.prefill(1, PROMPT)
    made.prefill(1, 512)
    with made.keys_differ_from(1, 512):
        made.run([Piece(1, 512, 80, True)], cached=False)
        made.run([Piece(1, 592, 20, False)], cached=False)
    made.pages_of[1] = made.pages_of[1][: 512 // PAGE]
    for layer in made.found:
        layer.clear()
    made.run([Piece(1, 512, PROMPT - 512, True)], cached=False)
    for run in (cold, made):
        run.run([Piece(1, PROMPT, 1, False)], cached=False)
    assert torch.equal(cold.states(1, PROMPT), made.states(1, PROMPT))
    assert made.numbers(1, PROMPT) == cold.numbers(1, PROMPT)
    for mine, theirs in zip(made.found, cold.found, strict=True):
        assert mine.items() <= theirs.items()


def test_scores_that_are_not_numbers_leave_all_alike() -> None:
    made = layers(index="minmax")
    made.broken = True
    made.prefill(1, PROMPT)
    sparse = len({a.first for a in made.found[0].values() if a is not None})
    made.run([Piece(1, PROMPT, 1, False)], cached=False)
    assert made.numbers(1, PROMPT) == [BUDGET, BUDGET]
    assert made.states(1, PROMPT)[-1, :, 1].tolist() == [sparse, 0]


def test_one_page_of_a_window_is_touched() -> None:
    made = layers()
    made.prefill(1, 640)
    memory = density_of(made.layers[0]).all
    touched = set(memory.means.flatten(1).any(1).nonzero().flatten().tolist())
    assert touched <= set(made.pages_of[1][BLOCK - 1 :: BLOCK])
    assert memory.nbytes() == made.num_pages / BLOCK * 2 * 2 * 4
    assert density_of(made.layers[1]).nbytes() == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e3, float("nan")])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    budget = {"name": "entropy", "temperature": temperature}
    with pytest.raises(KvplugError, match=r"temperature.* not "):
        check({"policy": "quest", "options": {"budget": budget}})
