"""The process that runs one engine: ``python -m kvplug.bench.engine``, a job on standard input.

Every measured cell is printed as one JSON line that starts with ``CELL``, every recall result with
``RECALL``; anything else on standard output is vLLM talking.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

from kvplug.bench.job import STOCK, UNSELECTED, Cell, Job


def model_path(name: str) -> str:
    """Path of a bundled model, built if need be, or ``name`` itself."""
    if name == "recall":
        from kvplug.models.recall import recall_model_path

        return str(recall_model_path())
    if name == "random":
        from kvplug.models.random_llama import random_llama_path

        return str(random_llama_path())
    if name == "trained":
        from kvplug.models.trained_llama import trained_llama_path

        return str(trained_llama_path())
    return name


class Bench:
    """One vLLM engine in this process and what is measured on it."""

    def __init__(self, job: Job) -> None:
        """Starts the engine."""
        from transformers import AutoTokenizer
        from vllm import EngineArgs, LLMEngine

        self.job = job
        path = model_path(job.model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        selection: dict[str, Any] = {}
        if job.policy not in (STOCK, UNSELECTED):
            selection = {
                "attention_backend": "CUSTOM",
                "additional_config": {"kvplug": {"policy": job.policy, **job.options}},
            }
        arguments = EngineArgs(
            model=path,
            dtype="bfloat16",
            block_size=job.page,
            max_model_len=max(job.contexts) + job.decoded + 64,
            max_num_batched_tokens=job.chunk,
            enforce_eager=job.eager,
            disable_log_stats=True,
            # Only the questions share a prefix; timed prompts are told apart by a salt.
            enable_prefix_caching=job.needles > 0,
            **selection,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self._serial = 0

    def retrieving_layers(self) -> list[Any]:
        """vLLM's attention layers that retrieve; none in stock vLLM."""
        if self.job.policy in (STOCK, UNSELECTED):
            return []
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        layers = get_layers_from_vllm_config(self.engine.vllm_config, Attention).values()
        return [layer for layer in layers if layer.impl.retrieves]

    def prompt(self, context: int, seed: int) -> tuple[list[int], str | None]:
        """A prompt of ``context`` tokens and what to answer, the same for every policy."""
        from kvplug.models.chains import chain_prompt
        from kvplug.models.documents import needle_prompt, random_tokens

        if self.job.model != "recall":
            return random_tokens(self.tokenizer, context, seed), None
        if self.job.document == "chain":
            ids, answer = chain_prompt(self.tokenizer, context, self.job.decoded, seed)
            return ids, str(self.tokenizer.decode(answer)).strip()
        depth = (seed * 0.37) % 1.0
        needle = needle_prompt(self.tokenizer, context, depth=depth, seed=seed)
        return needle.token_ids, needle.expected

    def run(
        self, prompts: list[list[int]], decoded: int, salt: str | None
    ) -> tuple[list[float], list[float], list[list[int]]]:
        """Serves prompts at once.

        Returns:
            Seconds to the first token of each; seconds of each step in which all of them decode;
            token ids of each.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=decoded, ignore_eos=True, detokenize=False
        )
        names: dict[str, int] = {}
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self._serial += 1
            names[str(self._serial)] = number
            request: dict[str, Any] = {"prompt_token_ids": prompt}
            if salt is not None:
                request["cache_salt"] = salt
            self.engine.add_request(str(self._serial), request, sampling)
        first: dict[int, float] = {}
        steps: list[float] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        while self.engine.has_unfinished_requests():
            before, complete = time.perf_counter(), len(first) == len(prompts)
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                number = names[output.request_id]
                tokens[number] = list(output.outputs[0].token_ids)
                first.setdefault(number, now - start)
            if complete and all(len(got) < decoded for got in tokens):
                steps.append(now - before)
        return list(first.values()), steps, tokens

    def cell(self, context: int, batch: int) -> Cell:
        """Measures one cell."""
        pairs = [self.prompt(context, seed) for seed in range(batch)]
        prompts = [ids for ids, _ in pairs]
        ttfts: list[float] = []
        totals: list[float] = []
        rates: list[float] = []
        kept: list[list[int]] = []
        for repeat in range(self.job.repeats):
            salt = f"{context} {batch} {repeat}"
            began = time.perf_counter()
            first, steps, tokens = self.run(prompts, self.job.decoded, salt)
            totals.append(time.perf_counter() - began)
            ttfts.append(statistics.median(first))
            # Where memory is short, requests may never all decode in one step.
            rates.append(batch / statistics.median(steps) if steps else 0.0)
            kept = kept or tokens
        correct = None
        if pairs[0][1] is not None:
            correct = all(
                self.answers(ids, expected or "")
                for ids, (_, expected) in zip(kept, pairs, strict=True)
            )
        return Cell(
            context, batch, statistics.median(ttfts), statistics.median(rates),
            statistics.median(totals), correct, kept,
        )  # fmt: skip

    def answers(self, ids: list[int], expected: str) -> bool:
        """Whether decoded tokens begin with the expected answer."""
        return str(self.tokenizer.decode(ids)).strip().startswith(expected)

    def recall(self) -> dict[str, int]:
        """Asks every needle of one document; the document itself is prefilled once."""
        from kvplug.models.documents import needle_questions

        context = max(self.job.contexts)
        prompts = needle_questions(self.tokenizer, context, self.job.needles, seed=11)
        right = 0
        for prompt in prompts:
            _, _, tokens = self.run([prompt.token_ids], 6, "recall")
            right += self.answers(tokens[0], prompt.expected)
        return {"context_tokens": context, "needles": len(prompts), "recalled": right}


def set_budget(layers: list[Any], tokens: int) -> None:
    """Gives retrieving layers another budget; no request may be running."""
    pipelines = [layer.impl.pipeline for layer in layers]
    for pipeline in {id(pipeline): pipeline for pipeline in pipelines}.values():
        pipeline.set_budget(tokens)


def main() -> None:
    """Runs the job on standard input."""
    job = Job.from_json(sys.stdin.read())
    bench = Bench(job)
    bench.run([bench.prompt(min(1024, *job.contexts), 99)[0]], 4, "warm")
    for context in job.contexts:
        for batch in job.batches:
            print("CELL", json.dumps(asdict(bench.cell(context, batch))), flush=True)
    if job.needles:
        print("RECALL", json.dumps(bench.recall()), flush=True)


if __name__ == "__main__":
    main()
