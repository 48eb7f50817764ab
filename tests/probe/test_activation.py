"""Activation probe: the mean query, weighted by how far a token stands out from what came before.

Weights are read off a probe by solving for them: a window has fewer tokens than a query numbers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.policies import check
from kvplug.probe.activation import ActivationProbe, activation_reference
from kvplug.probe.base import Probe, Probes
from kvplug.step import Step
from kvplug.workspace import Workspace
from tests.cases import PolicyCase
from tests.made_up import HEAD_DIM, Piece, World

PAGE, WINDOW, HEADS = 8, 16, 6
FIRST, STOP = 160, 176  # the window that tests look at


class Recorder(Probe):
    """Keeps a copy of every window's probe, by request row and first query."""

    name = "recorder"

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.seen: dict[tuple[int, int], torch.Tensor] = {}

    def build(
        self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
    ) -> Probes:
        vectors, counts = self.probe.build(queries, num_kv_heads, step, workspace)
        for w, row in enumerate(step.sparse_windows):
            first = int(step.windows.context_end[row] - step.windows.num_tokens[row])
            mine = vectors[w, :, : counts[w]].flatten(0, 1).clone()
            self.seen[int(step.windows.request[row]), first] = mine
        return Probes(vectors, counts)


class Asked(World):
    """A world whose queries a test gives, all windows of it sparse but for the first ones."""

    given: torch.Tensor | None = None

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        if salt == 2 and self.given is not None:
            return self.given
        return super()._content(request, heads, salt)

    def record(self) -> Recorder:
        """From now on, keeps the probes that are built."""
        assert self.layer is not None
        recorder = Recorder(self.layer.probe)
        self.layer.probe = recorder
        return recorder


def asked(queries: torch.Tensor | None = None, shuffle: int = 0, **options: Any) -> Asked:
    """A world with the probe's ``options``."""
    case = PolicyCase("quest", {"probe": {"name": "activation", **options}})
    regions = {"sink": 0, "local": 8, "budget": 8, "window": WINDOW, "dense_below": 0}
    made = Asked(case, regions, PAGE, shuffle=shuffle)
    made.given = queries
    return made


def probe_of(queries: torch.Tensor, **options: Any) -> torch.Tensor:
    """``[H, D]`` of the window of interest, float64."""
    made = asked(queries, **options)
    recorder = made.record()
    made.prefill(1, STOP)
    return recorder.seen[0, FIRST].double()


def weights_of(probe: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """``[c]``: the weights that make the window's queries ``[c, heads, D]`` the probe."""
    columns = queries[FIRST:STOP].double().flatten(1).T
    return torch.linalg.lstsq(columns, probe.flatten()[:, None]).solution[:, 0]


def random_queries() -> torch.Tensor:
    """``[STOP, H, D]`` float32, whose heads and dimensions differ in mean and spread."""
    spread = torch.rand(HEADS, HEAD_DIM) * 3 + 0.1
    return torch.randn(STOP, HEADS, HEAD_DIM) * spread + 2 * torch.randn(HEADS, HEAD_DIM)


def statistics(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance before the window of interest."""
    before = queries[:FIRST].double()
    return before.mean(0), before.var(0)


@pytest.mark.parametrize("share", ["all", "each"])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_twin(share: str, sharpness: float) -> None:
    """With the mean and variance of all queries before the window, and not the window's own."""
    queries = random_queries()
    probe = probe_of(queries, share=share, sharpness=sharpness)
    shares = 1 if share == "all" else 3
    expected = activation_reference(queries[FIRST:STOP], *statistics(queries), sharpness, shares)
    assert torch.allclose(probe, expected, atol=1e-5)
    assert not torch.allclose(probe, queries[FIRST:STOP].double().mean(0), atol=1e-2)


def test_constant_activation_gives_the_mean_query() -> None:
    """Every token lies one standard deviation from the mean, each in a direction of its own."""
    queries = random_queries()
    mean, variance = statistics(queries)
    signs = torch.randint(0, 2, (WINDOW, HEADS, HEAD_DIM)) * 2 - 1
    queries[FIRST:STOP] = (mean + signs * variance.sqrt()).float()
    probe = probe_of(queries)
    assert torch.allclose(probe, queries[FIRST:STOP].double().mean(0), atol=1e-5)


@pytest.mark.parametrize("before", [0.0, 1.0, -3e4])
@pytest.mark.parametrize("inside", [0.0, 1.0])
def test_queries_that_never_vary(before: float, inside: float) -> None:
    """No division by a variance of zero."""
    queries = torch.full((STOP, HEADS, HEAD_DIM), before)
    queries[FIRST:STOP] += inside
    assert torch.allclose(probe_of(queries), queries[FIRST].double())


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_weights_do_not_depend_on_scale(scale: float) -> None:
    """A power of two changes no digit of anything."""
    queries = random_queries()
    assert torch.equal(probe_of(queries * scale), probe_of(queries) * scale)


def test_weights_do_not_depend_on_the_mean() -> None:
    """What is added to all queries is added to the probe."""
    queries, shift = random_queries(), 10 * torch.randn(HEADS, HEAD_DIM)
    difference = probe_of(queries + shift) - probe_of(queries)
    assert torch.allclose(difference, shift.double(), atol=1e-4)


@pytest.mark.parametrize("outlier", [0, 7, 15])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_a_token_that_stands_out_weighs_more(outlier: int, sharpness: float) -> None:
    queries = random_queries()
    mean, _ = statistics(queries)
    moved = queries[FIRST + outlier] - mean.float()
    queries[FIRST + outlier] += 2 * moved  # three times as far out: nine times the bias
    weights = weights_of(probe_of(queries, sharpness=sharpness), queries)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    assert weights.argmax() == outlier
    others = (weights.sum() - weights[outlier]) / (WINDOW - 1)
    assert weights[outlier] > (3 if sharpness == 1 else 30) * others
    assert weights[outlier] > 1 / WINDOW


def test_who_weighs() -> None:
    """A token that stands out in one KV head counts for all heads, or for that head alone."""
    queries = random_queries()
    queries[FIRST + 5, 2:4] *= 20
    together, apart = probe_of(queries, share="all"), probe_of(queries, share="each")
    for head in range(3):
        mine = slice(2 * head, 2 * head + 2)
        weights = [weights_of(probe[mine], queries[:, mine]) for probe in (together, apart)]
        assert weights[0].argmax() == 5
        assert (weights[1].argmax() == 5) == (head == 1)


@pytest.mark.parametrize("warm_up", [9, 10, 11])
def test_warm_up(warm_up: int) -> None:
    """Ten windows lie before the one of interest."""
    queries = random_queries()
    probe, mean = probe_of(queries, warm_up=warm_up), queries[FIRST:STOP].double().mean(0)
    assert torch.allclose(probe, mean, atol=1e-5) == (warm_up > 10)


def test_sharpness_zero_is_the_mean_query() -> None:
    queries = random_queries()
    mean = queries[FIRST:STOP].double().mean(0)
    assert torch.allclose(probe_of(queries, sharpness=0), mean, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_query_weighs_nothing(value: float) -> None:
    queries = random_queries()
    queries[FIRST + 3] = value
    probe = probe_of(queries)
    assert probe.isfinite().all()
    kept = torch.cat([queries[FIRST : FIRST + 3], queries[FIRST + 4 : STOP]])
    expected = activation_reference(kept, *statistics(queries), 1.0, 1)
    assert torch.allclose(probe, expected, atol=1e-5)


def test_a_decoded_token_probes_with_its_query() -> None:
    queries = random_queries()
    made = asked(queries)
    made.prefill(1, 100)
    recorder = made.record()
    made.run([Piece(1, 100, 3, False)], cached=False)
    for position in (100, 101, 102):
        assert torch.equal(recorder.seen[0, position], queries[position])


@pytest.mark.parametrize("limit", [WINDOW, 64])
def test_chunks_batch_and_pages_do_not_matter(limit: int) -> None:
    """Bit for bit, where the contract tests see selections only."""
    whole, chunked = asked(), asked(shuffle=4)
    once, again = whole.record(), chunked.record()
    whole.prefill(1, 250, 640)
    chunked.prefill(2, 130)
    for start in range(0, 250, limit):
        pieces = [Piece(1, start, min(limit, 250 - start), True), Piece(2, 130 + start, 1, False)]
        chunked.run(pieces, cached=False)
    windows = [key for key in once.seen if key[0] == 0]
    assert len(windows) > 10
    for key in windows:
        assert torch.equal(once.seen[key], again.seen[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_up": 0}, r"warm_up >= 1 window.* not 0\.$"),
        ({"sharpness": -1.0}, r"0 <= sharpness <= 100, not -1\.0\.$"),
        ({"sharpness": math.nan}, r"not nan\.$"),
        ({"share": "eech"}, r"Unknown share 'eech': .*'each'"),
        ({"statistics": 1}, r"Unknown option 'statistics' of probe 'activation'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    probe = {"name": "activation", **options}
    with pytest.raises(KvplugError, match=message):
        check({"policy": "quest", "options": {"probe": probe}})


def test_a_probe_without_a_layer_knows_nothing() -> None:
    with pytest.raises(NotImplementedError):
        ActivationProbe().build(torch.zeros(1, 6, 8), 3, None, Workspace())  # type: ignore[arg-type]
