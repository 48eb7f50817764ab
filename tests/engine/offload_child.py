"""An engine with a cold store and a random schedule: a JSON spec on stdin, a result on stdout.

A spec holds ``offload`` (or null), ``model``, ``prompts``, ``blocks`` of the cache, ``seed``,
``steps`` before no more requests are sent, and ``fault``: the step from which on the disk cannot be
read, until it has failed a request; ``policy`` if not ``simhash``. Requests are sent, served
together and aborted at random; every step checks the pools. The result has each prompt's answers,
all of them.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

DECODED = 10


class Schedule:
    """Sends, aborts and steps.

    Args:
        spec: See the module.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        options = {"policy": spec.get("policy", "simhash"), "budget": 256, "local": 128,
                   "window": 128, "dense_below": 600, "offload": spec["offload"]}  # fmt: skip
        self.spec, self.draw = spec, random.Random(spec["seed"])
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=spec["model"], dtype="bfloat16", block_size=32, max_model_len=4096,
                max_num_batched_tokens=512, enforce_eager=True, attention_backend="CUSTOM",
                num_gpu_blocks_override=spec["blocks"],
                additional_config={"kvplug": options},
            )
        )  # fmt: skip
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        context = self.engine.vllm_config.compilation_config.static_forward_context
        self.pools = [hot for layer in context.values() if (hot := layer.impl.hot)]
        self.answers: dict[str, list[list[int]]] = {}
        self.running: dict[str, int] = {}
        self.sent = self.aborted = self.preempted = self.hits = 0
        self.failed: list[str] = []
        original = self.scheduler._preempt_request

        def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return original(request, *args, **kwargs)

        self.scheduler._preempt_request = preempt

    def send(self) -> None:
        """A random prompt, often with a prefix that is cached."""
        from vllm import SamplingParams

        number = self.draw.randrange(len(self.spec["prompts"]))
        name, self.sent = f"{self.sent}", self.sent + 1
        sampling = SamplingParams(temperature=0, max_tokens=DECODED, ignore_eos=True)
        self.engine.add_request(name, {"prompt_token_ids": self.spec["prompts"][number]}, sampling)
        self.running[name] = number

    def abort(self) -> None:
        """A random request goes."""
        name = self.draw.choice(list(self.running))
        self.engine.abort_request([name])
        del self.running[name]
        self.aborted += 1

    def step(self) -> None:
        """One step of the engine."""
        for output in self.engine.step():
            if output.finished and output.request_id in self.running:
                number = self.running.pop(output.request_id)
                done = output.outputs[0]
                if done.finish_reason == "error":
                    self.failed.append(output.request_id)
                    continue
                self.hits += bool(output.num_cached_tokens)
                self.answers.setdefault(str(number), []).append(list(done.token_ids))
        for pool in self.pools:
            pool.check_integrity()

    def run(self) -> dict[str, Any]:
        """Everything, to the end."""
        kept, broken = None, os.pipe()[1]  # which cannot be read by position
        store = self.pools[0].store if self.pools else SimpleNamespace(fd=None)
        step = 0
        while step < self.spec["steps"] or self.engine.has_unfinished_requests():
            if step < self.spec["steps"] and len(self.running) < 8 and self.draw.random() < 0.5:
                self.send()
            if self.running and self.draw.random() < 0.02:
                self.abort()
            if step == self.spec.get("fault"):
                kept, store.fd = store.fd, broken
            if self.engine.has_unfinished_requests():
                self.step()
            if kept is not None and self.failed:
                kept, store.fd = None, kept
            step += 1
        return {
            "answers": self.answers, "sent": self.sent, "aborted": self.aborted,
            "preempted": self.preempted, "hits": self.hits, "failed": self.failed,
            "pools": [asdict(pool.counts) for pool in self.pools],
            "free": self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }  # fmt: skip


def main() -> None:
    """Runs the spec."""
    print(json.dumps(Schedule(json.loads(sys.stdin.read())).run()))
