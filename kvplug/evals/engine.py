"""The process that answers questions: ``python -m kvplug.evals.engine``, a request on stdin.

One engine answers under every budget. Each reply is one line that starts with ``REPLY``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from kvplug.bench.engine import Bench, set_budget
from kvplug.bench.job import Job
from kvplug.evals.selector import SelectorMeter

MEASURED = 8
"""Most tokens of an answer during which selections are measured: each looks at every key."""


@dataclass(frozen=True)
class Request:
    """What one engine is asked."""

    job: Job
    """The engine."""
    budgets: list[int | None]
    """Which of them answers each prompt; one None for stock vLLM."""
    asked: list[tuple[int, int, str, int]]
    """Place in ``budgets``, a number to say back, prompt, most tokens of the answer."""
    selector: bool = False
    """Measure what each KV head selects; times then say nothing."""

    def to_json(self) -> str:
        """The request as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that :meth:`to_json` wrote."""
        data = json.loads(text)
        asked = [tuple(each) for each in data["asked"]]
        return cls(Job(**data["job"]), data["budgets"], asked, data["selector"])


class Answering:
    """One engine that answers.

    Args:
        request: What it is asked.
    """

    def __init__(self, request: Request) -> None:
        """Starts the engine."""
        self.request = request
        self.bench = Bench(request.job)
        self.budget: int | None = request.budgets[0]

    def set_budget(self, budget: int | None) -> None:
        """Gives retrieving layers another budget; None where there are none."""
        if budget is not None and budget != self.budget:
            set_budget(self.bench.retrieving_layers(), budget)
            self.budget = budget

    def measured_reply(self, prompt: str, most: int) -> dict[str, Any]:
        """Answers one prompt and measures, with every layer and head, what is selected for it."""
        layers = self.bench.retrieving_layers()
        since = len(self.bench.tokenizer(prompt)["input_ids"])
        meters = [SelectorMeter.of(layer.impl, since) for layer in layers]
        for layer, meter in zip(layers, meters, strict=True):
            layer.impl.observer = meter
        try:
            reply = self.reply(prompt, min(most, MEASURED))
        finally:
            for layer in layers:
                layer.impl.observer = None
        choices = [[list(choice) for choice in meter.means()] for meter in meters]
        return {**reply, "choices": choices}

    def reply(self, prompt: str, most: int) -> dict[str, Any]:
        """Answers one prompt, alone; no prefix is cached."""
        from vllm import SamplingParams

        engine = self.bench.engine
        ids = self.bench.tokenizer(prompt)["input_ids"]
        sampling = SamplingParams(temperature=0, max_tokens=most)
        start = time.perf_counter()
        engine.add_request("question", {"prompt_token_ids": ids}, sampling)
        first, steps, tokens = 0.0, [], []
        while engine.has_unfinished_requests():
            before = time.perf_counter()
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
            now = time.perf_counter()
            if first:
                steps.append(now - before)
            elif tokens:
                first = now - start
        text = self.bench.tokenizer.decode(tokens, skip_special_tokens=True)
        rate = 1 / statistics.median(steps) if steps else None
        return {"output": text, "tokens": tokens, "ttft_s": first, "decode_tok_s": rate}


def main() -> None:
    """Answers the request on standard input."""
    request = Request.from_json(sys.stdin.read())
    answering = Answering(request)
    if request.asked:
        answering.reply(request.asked[0][2][:2000], 4)  # warm
    for place, number, prompt, most in request.asked:
        answering.set_budget(request.budgets[place])
        answer = answering.measured_reply if request.selector else answering.reply
        print("REPLY", json.dumps([place, number, answer(prompt, most)]), flush=True)


if __name__ == "__main__":
    main()
