"""Prefills one prompt in a real vLLM engine and tells which events kvplug found in it.

A JSON spec on stdin: ``kvplug`` (options), ``engine`` (vLLM's engine arguments), ``ids`` and
``repeats``. A JSON result last on stdout: ``seconds`` of each prefill, each cold; ``boundaries``,
the tokens that begin an event; ``starts``, the pages that do.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch


class Watcher:
    """Keeps the block table of the prompt that is prefilled, to find its events afterwards."""

    def __init__(self) -> None:
        self.pages = torch.zeros(0, dtype=torch.int64)

    def install(self) -> None:
        """Wraps what learns from every step."""
        from kvplug.segment.surprise import SurpriseSegmenter

        original = SurpriseSegmenter.learn

        def learn(segmenter: Any, hidden: Any, tokens: Any, model: Any, step: Any) -> None:
            original(segmenter, hidden, tokens, model, step)
            length = int(step.stream.context_end.max())
            self.pages = step.block_table[0, : -(-length // segmenter.cutting.page)].long().clone()

        SurpriseSegmenter.learn = learn  # type: ignore[assignment, method-assign]

    def found(self, llm: Any, tokens: int) -> dict[str, list[int]]:
        """Events of the last prompt."""
        from kvplug.segment.base import EventStarts
        from kvplug.segment.cut import BEGINS
        from kvplug.segment.memory import SurpriseMemory

        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        common = next(iter(layers.values())).impl.pipeline.common
        if SurpriseMemory not in common:
            return {"boundaries": [], "starts": []}
        boundaries = common[SurpriseMemory].boundary[self.pages].flatten()[:tokens] & BEGINS
        starts = common[EventStarts].starts[self.pages]
        return {
            "boundaries": boundaries.nonzero().flatten().tolist(),
            "starts": starts.nonzero().flatten().tolist(),
        }


def main() -> None:
    """Runs the spec."""
    spec = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams

    watcher = Watcher()
    watcher.install()
    llm = LLM(
        dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False,
        attention_backend="CUSTOM", additional_config={"kvplug": spec["kvplug"]},
        **spec["engine"],
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=1)
    seconds = []
    for _ in range(1 + spec["repeats"]):  # the first warms up
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": spec["ids"]}], sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds[1:], **watcher.found(llm, len(spec["ids"]))}))
