"""The step strung from kernels selects and attends as the pipeline on CPU does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from kvplug.index.simhash import SimHashIndex
from kvplug.kernels.decode_regions import Regions
from kvplug.kernels.decode_step import DecodeStep, HashedLayer, StepShape, decode_step_reference
from kvplug.kernels.paged_attention import PagedCache
from kvplug.page_table import PageTable
from kvplug.pages import PageGeometry
from kvplug.probe.base import Probes
from kvplug.select.top_pages import TopPages
from kvplug.stage import Layer
from kvplug.step import Step
from kvplug.windows import cut_windows
from kvplug.workspace import Workspace
from tests.caches import KeyCache
from tests.kernels.accuracy import assert_accurate
from tests.made_up import layer_shape

HEADS, KV_HEADS, DIM, PAGE, LONGEST = 6, 2, 64, 16, 330
REGIONS = Regions(page=PAGE, sink_pages=1, local=40, budget_pages=3, dense_below=90)
LENGTHS = [330, 0, 321, 90, 91, 208, 1, 107]
"""Long, unused, long, at ``dense_below``, above it, long, a first token, as far as the budget."""
SCALE = 0.2


class Made(NamedTuple):
    """A step and what it works on."""

    known: SimHashIndex
    """Knows every key."""
    layer: HashedLayer
    """Knows every key but those of the step."""
    queries: torch.Tensor
    keys: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    context_end: torch.Tensor


def made(device: str, lengths: list[int]) -> Made:
    """Contexts of these lengths in shuffled pages."""
    batch, most = len(lengths), -(-LONGEST // PAGE)
    num_pages = batch * most + 1
    # Columns behind those that are used, as rows of vLLM's table have them.
    wide = torch.full((batch, most + 4), 2**30, dtype=torch.int32)
    wide[:, :most] = torch.randperm(num_pages)[: batch * most].view(batch, most)
    cache = torch.randn(num_pages, KV_HEADS, PAGE, 2 * DIM).half()
    shape = layer_shape(
        num_pages=num_pages, num_kv_heads=KV_HEADS, page=PAGE, head_dim=DIM, num_heads=HEADS
    )
    index = SimHashIndex(Layer(shape, {}, KeyCache(shape).reader()))
    above = torch.einsum("nhtd,hdb->nhtb", cache[..., :DIM].float(), index.planes) > 0
    index.words.copy_((above.long() << torch.arange(64)).sum(-1))
    last = torch.tensor(lengths) - 1
    pages = wide[torch.arange(batch), last.clamp(min=0) // PAGE].long()
    slots = torch.where(last >= 0, pages * PAGE + last % PAGE, -1)
    words = index.words.clone()
    written = slots[slots >= 0]
    words[written // PAGE, :, written % PAGE] = 0
    keys, values = cache.to(device).transpose(1, 2).split(DIM, -1)
    layer = HashedLayer(index.planes.to(device), words.to(device), PagedCache(keys, values), SCALE)
    new = cache[pages, :, last % PAGE, :DIM]
    return Made(
        index, layer, torch.randn(batch, HEADS, DIM).half().to(device), new.to(device),
        slots.to(device), wide.to(device)[:, :most],
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )  # fmt: skip


def step_for(lengths: list[int], device: str, regions: Regions = REGIONS) -> DecodeStep:
    """Buffers with room for more requests."""
    shape = StepShape(len(lengths) + 2, LONGEST + 50, HEADS, KV_HEADS, DIM)
    return DecodeStep.allocate(shape, regions, torch.device(device))


def run(step: DecodeStep, it: Made) -> torch.Tensor:
    out = torch.empty_like(it.queries)
    step(it.queries, it.keys, it.slots, it.block_table, it.context_end, it.layer, out)
    return out


def rows_on_cpu(it: Made) -> list[list[int]]:
    """Physical pages of each request and KV head, and last the tokens in them, by the pipeline."""
    used = [row for row, length in enumerate(it.context_end.tolist()) if length]
    geometry = PageGeometry(
        PAGE, PAGE, REGIONS.sink_pages, REGIONS.local, REGIONS.budget_pages, REGIONS.dense_below,
        REGIONS.budget_pages,
    )  # fmt: skip
    windows = cut_windows(
        np.arange(len(used) + 1, dtype=np.int32), it.context_end[used].cpu().numpy(),
        np.zeros(len(used), np.bool_), geometry,
    )  # fmt: skip
    step = Step(windows, it.block_table[used].cpu().contiguous(), REGIONS.budget_pages)
    sparse = torch.from_numpy(step.sparse_windows).long()
    vectors = it.queries[used].cpu().float()[sparse].view(-1, KV_HEADS, HEADS // KV_HEADS, DIM)
    signs = torch.einsum("whgd,hdb->whgb", vectors.double(), it.known.planes.double())
    assert signs.abs().min() > 1e-4  # no sign is in doubt
    scores = torch.empty(len(sparse), KV_HEADS, step.max_far_pages)
    counts = torch.full((len(sparse),), HEADS // KV_HEADS, dtype=torch.int32)
    it.known.score(Probes(vectors, counts), step, scores)
    wanted = torch.full((len(sparse), KV_HEADS), REGIONS.budget_pages, dtype=torch.int32)
    selected = torch.empty(*wanted.shape, REGIONS.budget_pages, dtype=torch.int32)
    TopPages().select(scores, step, wanted, selected)
    table = PageTable(step, geometry, KV_HEADS, Workspace())
    table.write_selected(selected, wanted, varies=False)
    found = []
    for pages, tokens in zip(table.table, table.seq_lens.tolist(), strict=True):
        found.append([*(pages[: -(-tokens // PAGE)] // KV_HEADS).tolist(), tokens])
    assert 0 < len(sparse) < len(used)
    return found


def test_rows_are_those_of_the_pipeline_on_cpu(device: str) -> None:
    it = made(device, LENGTHS)
    step = step_for(LENGTHS, device)
    out = run(step, it)
    found = []
    for row, tokens in enumerate(step.lengths.tolist()[: len(LENGTHS) * KV_HEADS]):
        if LENGTHS[row // KV_HEADS]:
            found.append([*step.table[row, : -(-tokens // PAGE)].tolist(), tokens])
        else:
            assert tokens == 0
    assert found == rows_on_cpu(it)
    assert (out[1] == 0).all()
    written = it.slots[it.slots >= 0].cpu()
    new = it.known.words[written // PAGE, :, written % PAGE]
    assert torch.equal(it.layer.words[written // PAGE, :, written % PAGE].cpu(), new)


def test_outputs_are_the_twins(device: str) -> None:
    it = made(device, LENGTHS)
    found = run(step_for(LENGTHS, device), it)
    plain, exact = torch.empty_like(found), torch.empty_like(found, dtype=torch.float64)
    for out in (plain, exact):
        decode_step_reference(*it[2:], it.layer, REGIONS, out)
    # One rounding of the output to float16, where plain torch happens to need none.
    assert_accurate(found, plain, exact, 2.0**-11 * float(exact.abs().max()))


def dense(it: Made) -> torch.Tensor:
    """Attention to everything in float64."""
    out = torch.zeros_like(it.queries, dtype=torch.float64)
    cache = it.layer.cache
    for row, length in enumerate(it.context_end.tolist()):
        pages = it.block_table[row, : -(-length // PAGE)].long()
        keys, values = (x[pages].flatten(0, 1)[:length].double() for x in cache[:2])  # [T, Hk, D]
        queries = it.queries[row].double().unflatten(0, (KV_HEADS, -1))
        weights = (torch.einsum("hgd,thd->hgt", queries, keys) * SCALE).softmax(-1)
        if length:
            out[row] = torch.einsum("hgt,thd->hgd", weights, values).flatten(0, 1)
    return out


@pytest.mark.parametrize(
    "regions",
    [REGIONS._replace(budget_pages=30, dense_below=0), REGIONS._replace(dense_below=LONGEST)],
    ids=["budget-of-everything", "short-contexts"],
)
def test_everything_is_attended_to_where_it_must_be(regions: Regions, device: str) -> None:
    it = made(device, LENGTHS)
    found = run(step_for(LENGTHS, device, regions), it)
    plain = torch.empty_like(found)
    decode_step_reference(*it[2:], it.layer, regions, plain)
    exact = dense(it)
    assert_accurate(found, plain, exact, 2.0**-11 * float(exact.abs().max()))


def test_alone_as_in_a_batch_to_the_bit(device: str) -> None:
    """And whatever the buffers held before, and however long the longest context is."""
    it = made(device, LENGTHS)
    step = step_for(LENGTHS, device)
    together = run(step, it)
    for row in (2, 4):
        one = slice(row, row + 1)
        alone = torch.empty_like(it.queries[one])
        plan = step.plan(it.block_table[one], it.context_end[one], longest=LENGTHS[row])
        step.write(it.keys[one], it.slots[one], it.layer)
        step.attend(it.queries[one], it.layer, plan, alone)
        assert torch.equal(alone, together[one])


def test_steps_that_do_not_fit_are_refused(device: str) -> None:
    step = step_for(LENGTHS, device)
    table = torch.zeros(len(LENGTHS) + 3, 9, dtype=torch.int32, device=device)
    ends = torch.ones(len(LENGTHS) + 3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="The buffers hold 10 requests of 380 tokens, not 11"):
        step.plan(table, ends)
    with pytest.raises(ValueError, match="not 1 of 381"):
        step.plan(table[:1], ends[:1], longest=381)
    odd = StepShape(1, 100, 5, 2, DIM)
    with pytest.raises(ValueError, match="heads that are a multiple of KV heads"):
        DecodeStep.allocate(odd, REGIONS, torch.device(device))
