"""What every policy promises, whatever it scores with (design, rules 1 to 4; invariants I2 to I7).

A sparse window attends to sinks | selected ascending | local, and nothing else; what it selects
depends on the request alone: not on the batch, the scheduler's chunks, the physical pages, or
what those pages held before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch

from kvplug.config import KvplugConfig
from kvplug.layer_stages import LayerStages
from kvplug.pages import sparse_context
from kvplug.pipeline import Plan
from kvplug.policies import POLICIES, make_stages
from kvplug.step import Sealing
from kvplug.workspace import Workspace
from tests.cases import POLICY_CASES, PolicyCase, policy_params
from tests.made_up import HEAD_DIM, Attended, Piece, World, layer_shape, reader_of
from tests.steps import Far, step_of

PAGE = 8
WINDOW = 16
OPTIONS = {
    "sink": 10,  # 2 pages
    "local": 20,
    "budget": 46,  # 5 pages: a part of a page does not count
    "window": WINDOW,
    "dense_below": 100,
}
SINKS, BUDGET = 2, 5

MIXED = [
    Piece(1, 256, 64, True),  # whole windows in the middle of a prompt
    Piece(2, 480, 37, True),  # the end of a prompt, inside a page
    Piece(3, 333, 1, False),
    Piece(4, 700, 11, False),  # tokens replayed after a preemption
    Piece(5, 0, 48, True),  # too short to be sparse
    Piece(6, 70, 1, False),  # the same, decoding
    Piece(7, 32, 160, True),  # becomes sparse half way
    Piece(8, 511, 1, False),  # the last token of a page
    Piece(9, 512, 1, False),  # the first
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of tiny calls: on a busy machine, waiting for a second thread takes the longest."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(threads)


def world(case: PolicyCase, **changed: object) -> World:
    shuffle = changed.pop("shuffle", 0)
    assert isinstance(shuffle, int)
    return World(case, {**OPTIONS, **changed}, PAGE, shuffle=shuffle)


def window_of(piece: Piece, position: int) -> tuple[int, int]:
    """First query and context end of the window that a position belongs to."""
    if not piece.prefilling:
        return position, position + 1
    first = position // WINDOW * WINDOW
    return first, min(first + WINDOW, piece.stop)


def far_of(first: int) -> range:
    """Far pages of a window whose first query stands at ``first``."""
    return range(SINKS, max(first + 1 - 20, 0) // PAGE)


def is_sparse(case: PolicyCase, first: int, end: int) -> bool:
    budget = BUDGET if case.retrieves else 0
    return not case.always_dense and len(far_of(first)) > budget and end > 100


def test_every_policy_is_listed() -> None:
    assert {case.name for case in POLICY_CASES} == set(POLICIES)


@pytest.mark.parametrize("case", policy_params())
def test_the_list_tells_what_a_policy_is(case: PolicyCase) -> None:
    stages = make_stages(case.name, case.options)
    assert stages.always_dense == case.always_dense
    assert (stages.index is not None) == case.retrieves
    assert (stages.probe is not None) == case.retrieves


@pytest.mark.parametrize("case", policy_params())
def test_which_windows_are_sparse(case: PolicyCase) -> None:
    chosen = world(case).run(MIXED)
    for piece in MIXED:
        for position in range(piece.start, piece.stop):
            expected = is_sparse(case, *window_of(piece, position))
            attended = chosen.pop((piece.request, position))
            assert (attended is not None) == expected, (piece, position)
            if attended is not None:
                assert (attended.first, attended.end) == window_of(piece, position)
    assert not chosen


@pytest.mark.parametrize("case", policy_params(sparse=True))
def test_rows_are_sinks_selected_local(case: PolicyCase) -> None:
    sparse = [attended for attended in world(case).run(MIXED).values() if attended is not None]
    assert sparse
    wanted = (BUDGET, BUDGET) if case.retrieves else (0, 0)
    if case.varies:
        wanted = 1, make_stages(case.name, case.options).budget.most_pages(BUDGET * PAGE, PAGE)
    for attended in sparse:
        far = far_of(attended.first)
        sinks, local = tuple(range(SINKS)), tuple(range(far.stop, -(-attended.end // PAGE)))
        assert len(attended.pages) == 3
        for row in attended.pages:
            selected = row[SINKS : len(row) - len(local)]
            assert row == (*sinks, *selected, *local)
            assert wanted[0] <= len(selected) <= wanted[1]
            assert list(selected) == sorted(set(selected))
            assert set(selected) <= set(far)


@pytest.mark.parametrize("case", policy_params(sparse=True))
def test_dense_rows_in_a_sparse_step_hold_every_page(case: PolicyCase) -> None:
    made = world(case)
    plan = made.plan(MIXED)
    assert plan is not None
    made.attend(MIXED, plan)
    windows = plan.step.windows
    dense = np.flatnonzero(~windows.sparse)
    assert len(dense) >= 3
    for s in dense:
        request = MIXED[windows.request[s]].request
        every = tuple(range(-(-int(windows.context_end[s]) // PAGE)))
        for head, entries in enumerate(made.rows(plan, s)):
            assert made.logical(request, head, entries) == every


@pytest.mark.parametrize("case", policy_params())
def test_a_step_can_be_repeated(case: PolicyCase) -> None:
    """As every layer after the first does, in the same buffers; and a new process (I7)."""
    made = world(case)
    once = made.run(MIXED)
    made.run([Piece(2, 0, 960, True)])  # leaves other values in every buffer
    assert made.run(MIXED) == once
    assert world(case).run(MIXED) == once


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_threads_do_not_matter(case: PolicyCase) -> None:
    once = world(case).run(MIXED)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert world(case).run(MIXED) == once


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_queries_decide(case: PolicyCase) -> None:
    """Otherwise the invariances below would hold for a policy that always takes the same pages."""
    made = world(case)
    once = made.run(MIXED)
    plan = made.plan(MIXED)
    assert plan is not None
    made.attend(MIXED, plan, sign=-1.0)
    assert dict(made.read(MIXED, plan)) != once
    heads_differ = [len(set(a.pages)) > 1 for a in once.values() if a is not None]
    assert any(heads_differ) != case.one_list


@pytest.mark.parametrize("case", policy_params())
def test_alone_as_in_a_batch(case: PolicyCase) -> None:
    """I5."""
    together = world(case).run(MIXED)
    for order in (MIXED, MIXED[::-1]):
        assert world(case).run(order) == together
    for piece in MIXED:
        alone = world(case).run([piece])
        assert alone == {key: together[key] for key in alone}, piece


PROMPT = 611


@pytest.mark.parametrize("limit", [WINDOW, 3 * WINDOW, 64, 256])
@pytest.mark.parametrize("case", policy_params())
def test_chunks_do_not_matter(case: PolicyCase, limit: int) -> None:
    """I4: in chunks of whole windows a prompt chooses as in one piece, with later keys unseen."""
    made = world(case)
    most = made.chunk_limit or PROMPT
    assert prefilled(made, 0, min(limit, most)) == prefilled(world(case), 0, most)


def prefilled(made: World, start: int, limit: int) -> dict[tuple[int, int], Attended | None]:
    """What the tokens of a prompt attend to, from ``start`` on, in chunks of ``limit`` tokens."""
    chosen: dict[tuple[int, int], Attended | None] = {}
    for first in range(start, PROMPT, limit):
        chunk = Piece(1, first, min(limit, PROMPT - first), True)
        chosen |= made.run([chunk], cached=False)
    return chosen


@pytest.mark.parametrize("case", policy_params())
def test_a_prefix_hit_is_as_good_as_a_cold_run(case: PolicyCase) -> None:
    """I6: another request with the same prefix went on in another way, at pages now shared."""
    made = world(case)
    limit = made.chunk_limit or PROMPT
    cold = prefilled(world(case), 0, limit)
    shared = 512
    made.prefill(1, shared)
    others = made.keys_differ_from(1, shared)
    with others:
        for first in range(shared, shared + 5 * WINDOW, WINDOW):
            made.run([Piece(1, first, WINDOW, True)], cached=False)
        made.run([Piece(1, shared + 5 * WINDOW, 1, False)], cached=False)
    start = shared - made.pipeline.stages.hit_margin(20, WINDOW)
    made.pages_of[1] = made.pages_of[1][: start // PAGE]
    hit = prefilled(made, start, limit)
    assert hit == {key: cold[key] for key in hit}


@pytest.mark.parametrize("case", policy_params())
def test_replay_is_as_decoded(case: PolicyCase) -> None:
    """I7: tokens decoded one by one, then replayed in one chunk on new pages."""
    made = world(case)
    decoded: dict[tuple[int, int], Attended | None] = {}
    made.prefill(4, 700)
    for position in range(700, 711):
        decoded |= made.run([Piece(4, position, 1, False)], cached=False)
    assert world(case, shuffle=3).run([Piece(4, 700, 11, False)]) == decoded


@pytest.mark.parametrize("case", policy_params())
def test_physical_pages_do_not_matter(case: PolicyCase) -> None:
    """Rule 1: the same content elsewhere in the cache, logically the same selection."""
    here, there = world(case), world(case, shuffle=5)
    assert here.run(MIXED) == there.run(MIXED)
    assert here.pages_of[1] != there.pages_of[1]


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_what_a_page_held_before_does_not_matter(case: PolicyCase) -> None:
    """Rule 1: pages that other requests used, handed on in another order."""
    fresh = world(case).run(MIXED)
    made = world(case)
    used: list[int] = []
    for request in range(100, 104):
        made.write(request, 0, 1000)
        used += made.pages_of.pop(request)
    made._free = used[::-3] + [page for page in used if page not in set(used[::-3])]
    assert made.run(MIXED) == fresh


def layer_of(case: PolicyCase) -> LayerStages:
    layer = world(case).layer
    assert layer is not None
    return layer


def states(layer: LayerStages) -> torch.Tensor:
    """``[pages, bytes]`` of everything a layer remembers, so that NaN equals NaN."""
    tensors = [tensor for memory in layer.memories for tensor in memory.state]
    rows = [t.contiguous().view(torch.uint8).reshape(t.shape[0], -1) for t in tensors]
    return torch.cat(rows, 1).clone()


@pytest.mark.parametrize("case", policy_params(retrieving=True))
@pytest.mark.parametrize("slot", [0, 1, PAGE - 1, 37 * PAGE, 37 * PAGE + 5, 600 * PAGE - 1])
def test_new_keys_change_what_is_known_of_their_own_page_only(case: PolicyCase, slot: int) -> None:
    layer = layer_of(case)
    for memory in layer.memories:
        for tensor in memory.state:
            tensor.fill_(3)
    before = states(layer)
    for memory in layer.forgetters:
        memory.forget(torch.tensor([slot]))
    changed = (states(layer) != before).any(1).nonzero().flatten().tolist()
    assert changed in ([], [slot // PAGE])
    for memory in layer.forgetters:
        memory.forget(torch.tensor([-1, -PAGE]))
    again = (states(layer) != before).any(1).nonzero().flatten().tolist()
    assert again == changed, "padding is not written"


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_pages_are_open_again_once_written_to(case: PolicyCase) -> None:
    made = world(case)
    made.run([Piece(1, 480, 20, True)])
    assert made.pipeline.seals is not None
    flags = made.pipeline.seals.flags
    far = [made.pages_of[1][n] for n in far_of(480)]
    assert flags[far].all()
    made._store(torch.zeros(1, 3, HEAD_DIM), made.slots(1, 100, 101))
    assert flags[far].sum() == len(far) - 1
    assert not flags[made.pages_of[1][100 // PAGE]]


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_pages_sealed_one_by_one_as_in_bulk(case: PolicyCase) -> None:
    """A page's summary follows from what it holds, not from what is sealed beside it."""
    found = []
    for size in (1, 3, 12):
        made = world(case)
        made.write(1, 0, 20 * PAGE)
        assert made.layer is not None
        step = step_of([Far(0, 2, 14)], made.table([Piece(1, 0, 20 * PAGE, True)]))
        logical = np.arange(2, 14, dtype=np.int32)
        for first in range(0, 12, size):
            part = logical[first : first + size]
            pages = np.array(made.pages_of[1], np.int32)[part]
            sealed = Sealing(pages, part, np.array([0, size], np.int32))
            for memory in made.layer.sealers:
                memory.seal(sealed, step, Workspace())
        found.append(states(made.layer))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("case", policy_params(retrieving=True, finds_a_key=True))
@pytest.mark.parametrize("needle", [SINKS * PAGE, 77, 300, 479])
def test_a_decoding_token_finds_its_own_key(case: PolicyCase, needle: int) -> None:
    """A far key that points where the query does, eight times as long, is always retrieved."""
    made, piece = world(case), Piece(1, 500, 1, False)
    assert needle // PAGE in far_of(500)
    made.plan([piece])  # brings the context
    queries = made.queries([piece])
    made._store(8 * queries[:, ::2].contiguous(), made.slots(1, needle, needle + 1))
    plan = made.plan([piece], cached=False)
    assert plan is not None
    made.attend([piece], plan)
    attended = dict(made.read([piece], plan))[1, 500]
    assert isinstance(attended, Attended)
    assert all(needle // PAGE in row for row in attended.pages)


@pytest.mark.parametrize("case", policy_params())
@pytest.mark.parametrize("far_pages", [0, 1, 60])
def test_a_budget_for_everything_is_dense(case: PolicyCase, far_pages: int) -> None:
    """Rule 2 (I2): a window whose far pages all fit takes the stock path; one page more does not.

    The budget of a policy that retrieves nothing is 0 pages, whatever the user says.
    """
    first = (SINKS + far_pages) * PAGE + 20 - 1
    budget = max(far_pages, 1) * PAGE if case.retrieves else 0
    made = world(case, budget=max(budget, PAGE), dense_below=0)
    assert len(far_of(first)) == far_pages
    fits = far_pages * PAGE <= budget or case.always_dense
    assert is_dense(made.plan([Piece(1, first, 1, False)])) == fits
    more = made.plan([Piece(1, first + (2 if far_pages == 0 else 1) * PAGE, 1, False)])
    assert is_dense(more) == case.always_dense


def is_dense(plan: Plan | None) -> bool:
    """Whether a step takes the stock path."""
    return plan is None or plan.table is None


@pytest.mark.parametrize("case", policy_params())
@pytest.mark.parametrize("tokens", [1, WINDOW], ids=["decode", "prefill"])
def test_short_contexts_are_dense(case: PolicyCase, tokens: int) -> None:
    """Rule 3: up to `dense_below` tokens of context, and not one more."""
    made = world(case, dense_below=512)
    assert is_dense(made.plan([Piece(1, 512 - tokens, tokens, tokens > 1)]))
    longer = made.plan([Piece(1, 512, tokens, tokens > 1)])
    assert is_dense(longer) == case.always_dense


@pytest.mark.parametrize("case", policy_params())
def test_warm_up_compiles_a_sparse_step(case: PolicyCase) -> None:
    """It must reach the same code as a step, or the first request waits for the compiler."""
    made = world(case)
    pages = sparse_context(made.pipeline.geometry) // PAGE + 1
    cache = torch.zeros(pages * 3, 1, PAGE, HEAD_DIM)
    made.pipeline.warm_up(layer_shape(num_pages=pages, page=PAGE), reader_of(cache))
    assert ("table.pages" in made.pipeline.workspace._buffers) == (not case.always_dense)
    assert ("selected" in made.pipeline.workspace._buffers) == case.retrieves


@pytest.mark.parametrize("case", policy_params())
def test_buffers_stop_growing(case: PolicyCase) -> None:
    made = world(case)
    made.run(MIXED)
    held = made.pipeline.workspace.nbytes()
    for piece in MIXED:
        made.run([piece])
    made.run(MIXED)
    assert made.pipeline.workspace.nbytes() == held


def test_the_budget_is_rounded_down_to_pages() -> None:
    config = KvplugConfig.parse(OPTIONS)
    assert make_stages("quest", {}).budget.pages(config.budget, PAGE) == BUDGET
