"""The process that measures one row's cells: ``python -m kvplug.bench.sweep``, a sweep on stdin.

One engine serves every context and budget: each step reads the budget anew, and cached prefixes are
dropped between. Every cell is one line that starts with ``CELL``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kvplug.bench.engine import Bench, model_path, set_budget
from kvplug.bench.job import Job
from kvplug.exact_mass import Mass
from kvplug.observe.mass_meter import MassMeter

LONG = 65_536
"""From this context on, first tokens are timed once."""
AT_ONCE = 8
"""Questions in a batch; answers do not depend on it."""
ANSWER = 6
"""Tokens of an answer: three words, a full stop, the end, one more."""
MASS_STEPS = 4
"""Decode steps of a question in which captured mass is measured."""
SEED = 11
"""Of the documents."""


@dataclass(frozen=True)
class Sweep:
    """One engine, and the contexts and budgets measured on it."""

    job: Job
    """Its ``budget`` option is the first of ``budgets``; prefix caching must be on."""
    budgets: list[int]
    """Budgets that are measured; one without meaning for stock vLLM."""
    needles: list[int]
    """Questions for each of the job's contexts."""
    mass_questions: int
    """Questions during which captured mass is measured."""

    def to_json(self) -> str:
        """The sweep as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Sweep:
        """The sweep that :meth:`to_json` wrote."""
        data = json.loads(text)
        return cls(**{**data, "job": Job(**data["job"])})


class Document:
    """Questions about one document; the model's tokenizer makes it before any engine starts.

    Args:
        job: Says which model.
        context: Tokens of each prompt.
        needles: Questions; a model other than the recall model gets one prompt of random words.
    """

    def __init__(self, job: Job, context: int, needles: int) -> None:
        """Writes the prompts."""
        from transformers import AutoTokenizer

        from kvplug.models.documents import needle_questions, random_tokens

        self.tokenizer = AutoTokenizer.from_pretrained(model_path(job.model))
        self.answers: list[str] = []
        if job.model != "recall" or not needles:
            self.prompts = [random_tokens(self.tokenizer, context, SEED)]
            return
        questions = needle_questions(self.tokenizer, context, needles, SEED)
        self.prompts = [question.token_ids for question in questions]
        self.answers = [question.expected for question in questions]


class SweepBench:
    """What is measured on one engine.

    Args:
        sweep: What to measure.
    """

    def __init__(self, sweep: Sweep) -> None:
        """Writes the documents and starts the engine."""
        job = sweep.job
        self.sweep = sweep
        self.documents = [
            Document(job, context, needles)
            for context, needles in zip(job.contexts, sweep.needles, strict=True)
        ]
        self.bench = Bench(job)
        self.layers = self.bench.retrieving_layers()

    def cells(self) -> Iterator[dict[str, Any]]:
        """Measures every context and budget."""
        self.bench.run([self.documents[0].prompts[0][:512]], 4, None)  # warm
        for context, document in zip(self.sweep.job.contexts, self.documents, strict=True):
            for budget in self.sweep.budgets:
                set_budget(self.layers, budget)
                yield {
                    "context_tokens": context,
                    "budget_tokens": budget,
                    **self.speed(document, self.repeats(context)),
                    **self.recall(document),
                    **self.mass(document),
                    "index_bytes_per_token": self.index_bytes_per_token(),
                }

    def pipelines(self) -> list[Any]:
        """The pipeline of each retrieving layer."""
        return [layer.impl.pipeline for layer in self.layers]

    def repeats(self, context: int) -> int:
        """How often first tokens are timed."""
        return 1 if context >= LONG else self.sweep.job.repeats

    def speed(self, document: Document, repeats: int) -> dict[str, float]:
        """First token and decode speed of one request; leaves its prompt in the prefix cache."""
        firsts, rates = [], []
        for _ in range(repeats):
            if not self.bench.engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not drop its cached prefixes")
            first, steps, _ = self.bench.run(document.prompts[:1], self.sweep.job.decoded, None)
            firsts.append(first[0])
            rates.append(1 / statistics.median(steps))
        return {"ttft_s": statistics.median(firsts), "decode_tok_s": statistics.median(rates)}

    def recall(self, document: Document) -> dict[str, int | None]:
        """Asks every question; the document comes from the prefix cache."""
        if not document.answers:
            return {"needles": None, "recalled": None}
        right = 0
        for start in range(0, len(document.prompts), AT_ONCE):
            batch = slice(start, start + AT_ONCE)
            _, _, tokens = self.bench.run(document.prompts[batch], ANSWER, None)
            right += sum(map(self.bench.answers, tokens, document.answers[batch]))
        return {"needles": len(document.answers), "recalled": right}

    def mass(self, document: Document) -> dict[str, Any]:
        """Captured mass of the last prompt token and the decoded ones, of questions spread evenly.

        Counted up to the first wrong word of an answer, which looks for other keys than the right
        one would. Each question weighs the same.

        Returns:
            ``mass`` and ``best_mass``, means over layers, and ``mass_by_layer``; None where no
            window selects pages, the cache cannot be read or positions are fixed.
        """
        count = min(self.sweep.mass_questions, len(document.prompts))
        numbers = [int((i + 0.5) * len(document.prompts) / count) for i in range(count)]
        found = [self.question_mass(document, number) for number in numbers]
        if not found or not all(found):
            return {"mass": None, "best_mass": None, "mass_by_layer": None}
        by_layer = [Mass.mean(layer) for layer in zip(*found, strict=True)]
        return {
            **dict(zip(("mass", "best_mass"), Mass.mean(by_layer), strict=True)),
            "mass_by_layer": [mass.captured for mass in by_layer],
        }

    def question_mass(self, document: Document, number: int) -> list[Mass]:
        """One question's mean mass of each retrieving layer; empty where a layer has none."""
        prompt = document.prompts[number]
        readers = [layer.impl.attend.reader(layer.impl.cache) for layer in self.layers]
        if None in readers or any(layer.impl.fixed is not None for layer in self.layers):
            return []
        meters = []
        for layer, reader in zip(self.layers, readers, strict=True):
            meters.append(
                MassMeter(reader, layer.impl.scale, layer.impl.logits_soft_cap, since=len(prompt))
            )
            layer.impl.observer = meters[-1]
        _, _, [tokens] = self.bench.run([prompt], MASS_STEPS + 1, None)
        for layer in self.layers:
            layer.impl.observer = None
        if not all(meter.measured for meter in meters):
            return []
        counted = self.right_words(document, number, tokens) + 1
        return [Mass.mean(meter.measured[:counted]) for meter in meters]

    def right_words(self, document: Document, number: int, tokens: list[int]) -> int:
        """Decoded tokens before the first wrong one; all of them where nothing is asked."""
        if not document.answers:
            return len(tokens)
        right = 0
        while right < len(tokens):
            text = str(document.tokenizer.decode(tokens[: right + 1])).strip()
            if not document.answers[number].startswith(text):
                break
            right += 1
        return right

    def index_bytes_per_token(self) -> float | None:
        """Bytes that a layer remembers of a token, all KV heads; shared memories by equal parts."""
        if not self.layers:
            return None
        pipelines = {id(pipeline): pipeline for pipeline in self.pipelines()}
        total = sum(pipeline.nbytes() for pipeline in pipelines.values())
        pages, _, page, _ = self.layers[0].kv_cache.shape
        return float(total / (len(self.layers) * pages * page))


def main() -> None:
    """Runs the sweep on standard input."""
    bench = SweepBench(Sweep.from_json(sys.stdin.read()))
    for cell in bench.cells():
        print("CELL", json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
