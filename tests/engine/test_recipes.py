"""Rule 4 for every recipe in a real engine: alone, in a batch, cold, on a prefix hit, any chunks.

One engine per recipe and chunk limit serves a prompt cold, then again (a prefix hit), then cold
once more among seven others. Compared are tokens and every window's pages in every layer and head.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.models.documents import needle_prompt
from tests.cases import POLICY_CASES, PolicyCase

pytestmark = pytest.mark.engine
WINDOW, LOCAL = 128, 256
LENGTH = 2_900  # not a multiple of the window: the last one is partial
DECODED = 12
CHUNKS = (512, 2048, 8192)
CUT = 1_000  # seven windows, and three pages and a bit of the eighth
CASES = list({case.name: case for case in reversed(POLICY_CASES) if case.retrieves}.values())

CARRYING = [case for case in CASES if case.name in ("actqkv", "infllm", "emllm", "hax", "hcam")]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Eight documents; the first is the one that is compared."""
    return [
        needle_prompt(tokenizer, LENGTH + 150 * n, depth=0.4, seed=40 + n).token_ids
        for n in range(8)
    ]


def spec(model: str, case: PolicyCase, prompts: list[list[int]], chunk: int) -> dict[str, Any]:
    """Three rounds of one engine."""

    def requests(served: list[list[int]], salt: str) -> list[dict[str, Any]]:
        return [{"ids": ids, "max_tokens": DECODED, "salt": salt} for ids in served]

    return {
        "kvplug": {
            "policy": case.name, "options": case.options, "budget": 256, "local": LOCAL,
            "window": WINDOW, "dense_below": 600,
        },
        "engine": {
            "model": model, "block_size": 32, "max_model_len": 4096,
            "max_num_batched_tokens": chunk,
        },
        "rounds": [
            requests(prompts[:1], "first"), requests(prompts[:1], "first"),
            requests(prompts, "batch"),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_request_same_answer(run, recall_model, prompts, case):
    results = [run(spec(recall_model, case, prompts, chunk)) for chunk in CHUNKS]
    cold = results[0]["rounds"][0][0]
    assert cold["cached"] == 0
    for result in results:
        alone, hit = result["rounds"][0][0], result["rounds"][1][0]
        among = result["rounds"][2][0]
        assert hit["cached"] > LENGTH // 2, "the second time was meant to be a prefix hit"
        assert hit["cached"] % WINDOW == 0
        assert among["cached"] == 0
        assert alone["tokens"] == hit["tokens"] == among["tokens"] == cold["tokens"]
    windows = [own_windows(result, case) for result in results]
    assert all(other == windows[0] for other in windows[1:])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_offloaded_it_is_the_same(run, recall_model, prompts, case, tmp_path_factory):
    """The cache on a disk, and a pool that holds one window's pages and a few more."""
    plain = spec(recall_model, case, prompts, CHUNKS[1])
    offload = {"tier": "disk", "hot_gib": 0.004, "cold_gib": 0.25}
    folder = str(tmp_path_factory.mktemp("cold"))
    options = {**plain["kvplug"], "offload": {**offload, "path": folder}}
    there, here = run({**plain, "kvplug": options}), run(plain)
    assert there["rounds"] == here["rounds"]
    assert there["selections"] == here["selections"]
    assert len(there["pools"]) == 2
    assert all(pool["evictions"] > 0 and not pool["failed"] for pool in there["pools"])
    assert sum(pool["bytes_written"] for pool in there["pools"]) > 0


@pytest.mark.parametrize("case", CARRYING, ids=lambda case: case.id)
def test_a_window_that_a_prompt_cut_short_is_not_shared(run, recall_model, prompts, case):
    """Its whole pages are the beginning of another prompt's whole window, but its state is not."""
    asked = spec(recall_model, case, prompts, CHUNKS[1])
    [whole] = asked["rounds"][0]
    short = {**whole, "ids": whole["ids"][:CUT]}
    asked["rounds"] = [[short], [whole], [{**whole, "salt": "cold"}]]
    result = run(asked)
    _, [after], [cold] = result["rounds"]
    assert cold["cached"] == 0
    assert 0 < after["cached"] <= CUT // WINDOW * WINDOW
    assert after["cached"] % WINDOW == 0
    assert after["tokens"] == cold["tokens"]
    compared = 0
    for name, selected in result["selections"].items():
        end, tokens = map(int, name.split("/"))
        # Others are the short prompt's own.
        if end > CUT + WINDOW and (tokens in (WINDOW, 1) or end == LENGTH):
            compared += 1
            assert selected[:2] == selected[2:], f"window {name} differs"
    assert compared > (LENGTH - CUT) // WINDOW


def own_windows(result: dict[str, Any], case: PolicyCase) -> dict[str, Any]:
    """What the first prompt's windows selected, the same every time they were computed.

    The prompt is the shortest, so its windows are seen first under their name; on the hit only
    those behind the cached prefix are computed again, and in the batch all of them.
    """
    layers = 2
    own = {}
    for name, selected in result["selections"].items():
        end, tokens = map(int, name.split("/"))
        if tokens not in (WINDOW, 1) and end != LENGTH:
            continue  # the last window of another prompt
        if end > LENGTH + DECODED:
            continue
        first = own[name] = selected[:layers]
        assert len(first) == layers
        if end > result["rounds"][1][0]["cached"]:
            assert selected[layers : 2 * layers] == first, f"window {name} differs on the hit"
        again = selected[-8 * layers :]  # one of up to eight requests in the last round
        assert all(rows in again for rows in first), f"window {name} differs in the batch"
    assert len(own) > LENGTH // WINDOW // 2 + DECODED // 2, f"{case.id}: too few sparse windows"
    return own
