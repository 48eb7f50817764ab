"""The coarse merge: members weighted by their summaries, one by one in float64; and its limits.

With keys that are equal within every page it is attention to everything; with one page and
nothing near, attention in that page.
"""

from __future__ import annotations

import math

import pytest
import torch
from vllm import _custom_ops as ops

from kvplug.attention.attend.coarse import CoarseMerge, coarse_attention
from kvplug.attention.attend.cpu import CpuAttend, SingleHeadCache
from kvplug.pipeline import Plan
from kvplug.workspace import Workspace
from tests.test_rewritten_attention import BATCHES, HEADS, Cache, Shape, filled, plan_of, stock

SHAPES = [
    pytest.param(Shape(dtype, group, dim, page), id=f"{str(dtype)[6:]}-G{group}-D{dim}-P{page}")
    for dtype in (torch.float32, torch.bfloat16)
    for group, dim, page in ((1, 64, 32), (3, 128, 64), (2, 80, 32))
]


def members(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor],
    weights: list[float | None], scale: float, cap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """``sum over members of softmax(l) * attention inside``, as the paper has it, in float64.

    Args:
        query: ``[D]``.
        keys: Of each member, ``[tokens, D]``.
        values: The same.
        weights: ``l`` of each member; None for its own log-sum-exp.
        scale: Of the dot products.
        cap: Of the logits, 0 for none.
    """
    inner, outer = [], []
    for key, value, weight in zip(keys, values, weights, strict=True):
        logits = scale * (key.double() @ query.double())
        logits = cap * torch.tanh(logits / cap) if cap else logits
        inner.append(logits.softmax(0) @ value.double())
        outer.append(logits.logsumexp(0).item() if weight is None else weight)
    return torch.tensor(outer, dtype=torch.float64).softmax(0) @ torch.stack(inner)


def pages_of(count: int, page: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[L, D, P]`` and values ``[L, P, D]``."""
    return torch.randn(count, dim, page), torch.randn(count, page, dim)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize(("before", "far", "behind"), [(1, 4, 2), (0, 1, 1), (2, 3, 0), (2, 0, 3)])
def test_twin(before: int, far: int, behind: int, cap: float) -> None:
    """Near tokens are one member, whichever pages they lie in and whatever is hidden of them."""
    count, page, dim, scale = before + far + behind, 5, 7, 0.4
    keys, values = pages_of(count, page, dim)
    query, means = torch.randn(3, dim), torch.randn(far, dim)
    hidden = torch.zeros(3, count, page, dtype=torch.bool)
    near = [n for n in range(count) if not before <= n < before + far]
    hidden[:, near] = torch.rand(3, len(near), page) < 0.4
    hidden[:, near[0], 0] = False
    chosen = slice(before, before + far)
    found = coarse_attention(query, keys, values, chosen, means, hidden, scale, cap)
    for row in range(3):
        seen = ~hidden[row]
        near_keys = torch.cat([keys[n].T[seen[n]] for n in near])
        near_values = torch.cat([values[n][seen[n]] for n in near])
        weights: list[float | None] = [None]
        for mean in means:
            logit = scale * (mean.double() @ query[row].double())
            logit = cap * torch.tanh(logit / cap) if cap else logit
            weights.append(logit.item() + math.log(page))
        expected = members(
            query[row], [near_keys, *keys[chosen].mT], [near_values, *values[chosen]], weights,
            scale, cap,
        )  # fmt: skip
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-6)


def test_one_page_and_nothing_near_is_attention_in_that_page() -> None:
    keys, values = pages_of(1, 9, 6)
    query = torch.randn(4, 6)
    hidden = torch.zeros(4, 1, 9, dtype=torch.bool)
    for means in (torch.randn(1, 6), torch.full((1, 6), 30.0)):
        found = coarse_attention(query, keys, values, slice(0, 1), means, hidden, 0.5)
        expected = (0.5 * query @ keys[0]).softmax(-1) @ values[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_keys_within_pages_are_attention_to_all() -> None:
    """And the exact merge too, which is a softmax over all of them."""
    keys, values = pages_of(6, 8, 16)
    keys = keys[:, :, :1].expand(-1, -1, 8).contiguous()
    query = torch.randn(5, 16)
    hidden = torch.zeros(5, 6, 8, dtype=torch.bool)
    found = coarse_attention(query, keys, values, slice(1, 5), keys[1:5, :, 0], hidden, 0.25)
    everything = keys.permute(1, 0, 2).flatten(1)
    expected = (0.25 * query @ everything).softmax(-1) @ values.flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_spread_page_weighs_less_than_in_attention() -> None:
    """Keys ``+a`` and ``-a`` have mean 0: weight 2, where attention gives ``2 cosh(a)``.

    Values are 1 there and 0 at a near page of two zero keys, so the output is the page's share.
    """
    a = 2.0
    keys = torch.tensor([[[a, -a]], [[0.0, 0.0]]])
    values = torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]])
    hidden = torch.zeros(1, 2, 2, dtype=torch.bool)
    means = torch.zeros(1, 1)
    share = coarse_attention(torch.ones(1, 1), keys, values, slice(0, 1), means, hidden, 1.0)
    assert share.item() == pytest.approx(2 / (2 + 2))
    attention = 2 * math.cosh(a) / (2 * math.cosh(a) + 2)
    assert attention > 0.75


def means_of(shape: Shape, cache: Cache, spoilt: bool) -> torch.Tensor:
    """``[pages, Hk, D]`` mean keys of the requests' whole pages; the others hold NaN."""
    means = torch.full((len(cache.packed), HEADS, shape.dim), torch.nan)
    for row, keys in enumerate(cache.keys):
        whole = len(keys) // shape.page
        paged = keys[: whole * shape.page].float().unflatten(0, (whole, shape.page))
        means[cache.block_table[row, :whole].long()] = paged.mean(1)
    return means + torch.randn_like(means) if spoilt else means


def merged(
    shape: Shape, cache: Cache, plan: Plan, means: torch.Tensor, cap: float = 0.0
) -> torch.Tensor:
    """The coarse merge over a cache that vLLM's op filled: ``[T, H, D]``."""
    kernel = CpuAttend(HEADS * shape.group, HEADS, shape.dim, shape.dtype, shape.isa, "auto")
    single = SingleHeadCache.of(cache.packed)
    keys, values = kernel.reader(single), kernel.value_reader(single)
    assert keys is not None
    assert values is not None
    output = torch.full_like(cache.queries, 7.0)
    merge = CoarseMerge(keys, values, means, shape.dim**-0.5, cap)
    merge(cache.queries, output, plan, Workspace())
    return output


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_over_a_real_cache(
    shape: Shape, batch: str, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages as vLLM's op writes them; several queries, heads and blocks of rows; a partial page.

    Summaries are wrong on purpose: that they decide, and not the keys, is the point.
    """
    monkeypatch.setattr("kvplug.attention.attend.coarse.ROWS", 100)
    cache = filled(shape, batch)
    plan, chosen = plan_of(shape, cache, batch, everything=False)
    means = means_of(shape, cache, spoilt=True)
    found = merged(shape, cache, plan, means, cap)
    windows, scale, page = plan.step.windows, shape.dim**-0.5, shape.page
    sparse = torch.zeros(len(found), dtype=torch.bool)
    for s, per_head in chosen.items():
        request, start = int(windows.request[s]), int(windows.token_start[s])
        count, end = int(windows.num_tokens[s]), int(windows.context_end[s])
        sparse[start : start + count] = True
        # The window's first and last queries, and one between.
        for i in {0, count // 2, count - 1}:
            for head, pages in enumerate(per_head):
                key, value = cache.keys[request][:, head], cache.values[request][:, head]
                stop = end - count + i + 1
                near = [*range(int(windows.far_begin[s]) * page),
                        *range(int(windows.far_end[s]) * page, stop)]  # fmt: skip
                parts = [near, *([*range(b * page, (b + 1) * page)] for b in pages)]
                for g in range(shape.group):
                    query = cache.queries[start + i, head * shape.group + g]
                    weights: list[float | None] = [None]
                    for b in pages:
                        mean = means[cache.block_table[request, b], head].double()
                        logit = scale * (mean @ query.double())
                        logit = cap * torch.tanh(logit / cap) if cap else logit
                        weights.append(logit.item() + math.log(page))
                    expected = members(
                        query, [key[p] for p in parts], [value[p] for p in parts], weights,
                        scale, cap,
                    )  # fmt: skip
                    mine = found[start + i, head * shape.group + g].double()
                    step = torch.finfo(shape.dtype).eps
                    torch.testing.assert_close(mine, expected, rtol=step, atol=1e-5)
    assert not sparse.all()
    assert (found[~sparse] == 7).all(), "dense windows are not its business"


def test_equal_keys_within_pages_over_a_real_cache_are_stock_attention() -> None:
    """Everything selected, float32: coarse, exact and dense are the same."""
    shape = Shape(torch.float32, 2, 64, 32)
    cache = filled(shape, "mixed")
    packed, keys = cache.packed.clone(), []
    key_cache, value_cache = packed.view(len(packed), HEADS, 2 * 32, 64).chunk(2, dim=2)
    for row, key in enumerate(cache.keys):
        whole = -(-len(key) // 32)
        equal = torch.randn(whole, 1, HEADS, 64).expand(-1, 32, -1, -1).flatten(0, 1)
        slots = (cache.block_table[row, :whole].long()[:, None] * 32 + torch.arange(32)).flatten()
        value = torch.zeros(whole * 32, HEADS, 64)
        value[: len(key)] = cache.values[row]
        ops.cpu_attn_reshape_and_cache(
            equal.contiguous(), value, key_cache, value_cache, slots, shape.isa
        )
        keys.append(equal[: len(key)])
    cache = cache._replace(keys=keys, packed=packed)
    plan, chosen = plan_of(shape, cache, "mixed", everything=True)
    dense = stock(shape, cache, "mixed")
    found = merged(shape, cache, plan, means_of(shape, cache, spoilt=False))
    windows = plan.step.windows
    assert chosen
    for s in chosen:
        tokens = slice(
            int(windows.token_start[s]), int(windows.token_start[s] + windows.num_tokens[s])
        )
        torch.testing.assert_close(found[tokens], dense[tokens], rtol=0, atol=1e-5)


def test_what_a_page_held_behind_the_context_does_not_matter() -> None:
    """NaN in slots that no token has been written to."""
    shape = Shape(torch.float32, 2, 64, 32)
    cache = filled(shape, "mixed")
    plan, _ = plan_of(shape, cache, "mixed", everything=False)
    means = means_of(shape, cache, spoilt=False)
    clean = merged(shape, cache, plan, means)
    packed = cache.packed.clone()
    key_cache, value_cache = packed.view(len(packed), HEADS, 2 * 32, 64).chunk(2, dim=2)
    for row, key in enumerate(cache.keys):
        behind = torch.arange(len(key), -(-len(key) // 32) * 32)
        slots = cache.block_table[row, behind // 32].long() * 32 + behind % 32
        nothing = torch.full((len(behind), HEADS, 64), torch.nan)
        ops.cpu_attn_reshape_and_cache(nothing, nothing, key_cache, value_cache, slots, shape.isa)
    assert torch.equal(merged(shape, cache._replace(packed=packed), plan, means), clean)
