"""Trains the small model of ``kvplug/models/trained``: ``python tools/train_small.py --out DIR``.

A Llama of five million weights learns to recall from text: attention that was learnt, and so is
diffuse, beside the constructed model's exact one. Sequences are the lab's own recall tasks, packed;
random words that come twice, which is where copying is learnt first; and made-up prose. Positions
have gaps (PoSE, Zhu et al. 2024, arXiv 2309.10400), so that short sequences show all distances up
to 40,000 tokens; the last phases are long, so that attention learns to stay sharp among many keys.

Everything follows from ``--seed``. Losses go to ``losses.csv``, weights and settings beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kvplug.evals.haystack import Noise, Prose
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.base import Materials
from kvplug.evals.wording import Wording
from kvplug.models.checkpoint import write_checkpoint
from kvplug.models.documents import random_tokens
from kvplug.models.tokenizer import build_tokenizer, vocabulary

GEOMETRY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
}
POSITIONS = 40_960
"""Distances that training shows."""
TASK_SHARES = {
    "niah_single_1": 2, "niah_multikey_2": 3, "niah_multikey_3": 1, "niah_multivalue": 1,
    "niah_multiquery": 1, "passkey": 2, "number_string": 1, "kv_retrieval": 1, "mqar": 3,
    "joint_recall": 2, "vt": 1, "episodes": 1,
}  # fmt: skip
COPY, TASK, PROSE = 0.3, 0.65, 0.05
"""Shares of the kinds of pieces."""
WARM_UP, TOLD = 200, 50
"""Steps in which the rate grows; steps between two lines of output."""
CONTEXT_WEIGHT = 0.05
"""Of a token that nothing before it tells, against 1 of one that is recalled."""


@dataclass(frozen=True)
class Phase:
    """Steps at one length."""

    steps: int
    length: int
    """Tokens of a sequence."""
    batch: int
    rate: float
    """Learning rate at its start; falls to a tenth by its end."""


PHASES = (
    Phase(3000, 256, 32, 2e-3),
    Phase(1000, 1024, 8, 1e-3),
    Phase(300, 4096, 2, 5e-4),
    Phase(100, 16384, 1, 2e-4),
)


class Pieces:
    """Token ids and how much each counts.

    Args:
        tokenizer: The bundled models'.
        draw: Where everything comes from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> None:
        """Prepares the materials."""
        self.tokenizer, self.draw = tokenizer, draw
        self.materials = Materials(Noise(), Prose(), Wording(plain=True))
        self.digits = Materials(Noise(), Prose(), Wording(plain=False))
        self.tasks = list(TASK_SHARES)

    def piece(self, length: int) -> tuple[list[int], list[float]]:
        """A piece of about ``length`` tokens."""
        kind = self.draw.random()
        if kind < COPY:
            return self.copy(length)
        return self.task(length) if kind < COPY + TASK else self.prose(length)

    def copy(self, length: int) -> tuple[list[int], list[float]]:
        """Random words, then stretches of them again."""
        first = max(length // 2, 8)
        ids = random_tokens(self.tokenizer, first, self.draw.getrandbits(32))
        weights = [CONTEXT_WEIGHT] * first
        while len(ids) < length:
            start, size = self.draw.randrange(first - 4), self.draw.randint(4, 24)
            again = ids[start : min(start + size, first)]
            # Its first two tokens cannot be foreseen.
            ids += again
            weights += [0.0, 0.0, *[1.0] * (len(again) - 2)]
        return ids, weights

    def task(self, length: int) -> tuple[list[int], list[float]]:
        """A task's prompt and its answer."""
        name = self.draw.choices(self.tasks, list(TASK_SHARES.values()))[0]
        task, seed = TASKS.get(name), self.draw.getrandbits(32)
        materials = self.digits if self.draw.random() < 0.15 else self.materials
        size, low, ids, answer = max(task.smallest, 1), 0, [], []
        for _ in range(4):  # sizes are tried until the length is about right
            example = task.make(random.Random(seed), size, materials)
            ids = self.encode(example.prompt)
            answer = self.encode(f" {', '.join(example.answers)}.")
            low = len(ids) + len(answer)
            wanted = int(size * length / low)
            if abs(low - length) < length // 8 or wanted == size:
                break
            size = max(wanted, task.smallest, 1)
        return [*ids, *answer], [*[CONTEXT_WEIGHT] * len(ids), *[1.0] * len(answer)]

    def prose(self, length: int) -> tuple[list[int], list[float]]:
        """Sentences."""
        ids = self.encode(" ".join(self.materials.text.sentences(self.draw, length // 9 + 1)))
        return ids, [0.3] * len(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids without specials."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def sequences(pieces: Pieces, length: int, begin: int) -> Iterator[tuple[list[int], list[float]]]:
    """Endless sequences of ``length + 1`` tokens: whole pieces of very different lengths."""
    draw = pieces.draw
    while True:
        ids, weights = [begin], [0.0]
        while length + 1 - len(ids) >= 48:
            room = length + 1 - len(ids)
            wanted = min(room, int(64 * (length / 64) ** draw.random()))
            more, counted = pieces.piece(int(wanted * 0.9))
            if len(more) > room:
                continue
            ids += more
            weights += counted
        filler = length + 1 - len(ids)
        yield ids + [begin] * filler, weights + [0.0] * filler


def positions(draw: random.Random, length: int) -> list[int]:
    """Ascending positions below POSITIONS: contiguous stretches with gaps between them."""
    cuts = sorted(draw.sample(range(1, length), min(draw.randint(0, 6), length - 1)))
    slack = POSITIONS - length
    # Small and large gaps alike.
    jumps = [int(slack * draw.random() ** 3 / (len(cuts) + 1)) for _ in range(len(cuts) + 1)]
    found, offset, upcoming = [], jumps[0] if draw.random() < 0.3 else 0, 0
    for place in range(length):
        if upcoming < len(cuts) and place == cuts[upcoming]:
            upcoming += 1
            offset += jumps[upcoming]
        found.append(place + offset)
    return found


def new_model(tokens: int, seed: int) -> LlamaForCausalLM:
    """The model, untrained."""
    torch.manual_seed(seed)
    sizes = {key: value for key, value in GEOMETRY.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": GEOMETRY["rope_theta"]}
    config = LlamaConfig(
        vocab_size=tokens, rope_parameters=rope, attn_implementation="sdpa", use_cache=False,
        tie_word_embeddings=False, rms_norm_eps=1e-6, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(phases: tuple[Phase, ...], seed: int, out: Path) -> None:
    """Trains, and writes weights, losses and what they were made with."""
    tokenizer, draw = build_tokenizer(), random.Random(seed)
    model = new_model(len(vocabulary()), seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98), lr=0.0,
    )  # fmt: skip
    pieces, start = Pieces(tokenizer, draw), time.perf_counter()
    losses: list[tuple[int, int, float, float]] = []
    out.mkdir(parents=True, exist_ok=True)
    for number, phase in enumerate(phases):
        source = sequences(pieces, phase.length, tokenizer.bos_token_id)
        for done in range(phase.steps):
            warm = min(1.0, len(losses) / WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = phase.rate * warm * (1 - 0.9 * done / phase.steps)
            losses.append((number, len(losses), *step(model, optimizer, source, phase, draw)))
            if len(losses) % TOLD == 0:
                mean = sum(loss[2] for loss in losses[-TOLD:]) / TOLD
                print(f"{time.perf_counter() - start:7.0f} s, step {len(losses)}, "
                      f"length {phase.length}: recalled {mean:.3f}", flush=True)  # fmt: skip
        told = {
            "seed": seed, "steps": len(losses), "seconds": round(time.perf_counter() - start),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "phases": [asdict(phase) for phase in phases],
        }  # fmt: skip
        save(model, out, losses, told)


def step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer,
    source: Iterator[tuple[list[int], list[float]]], phase: Phase, draw: random.Random,
) -> tuple[float, float]:  # fmt: skip
    """One step; mean losses of recalled tokens and of all others."""
    rows = [next(source) for _ in range(phase.batch)]
    ids = torch.tensor([row for row, _ in rows])
    weights = torch.tensor([weight for _, weight in rows])[:, 1:]
    places = torch.tensor([positions(draw, phase.length) for _ in rows])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], position_ids=places).logits
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view_as(weights)
    total = (loss * weights).sum() / weights.sum()
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    recalled = weights == 1
    return float(loss[recalled].mean()), float(loss[~recalled].mean())


def save(
    model: LlamaForCausalLM, out: Path, losses: list[tuple[int, int, float, float]],
    told: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the checkpoint, the losses and how it came about."""
    write_checkpoint(out, model.state_dict(), GEOMETRY)
    with (out / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("phase", "step", "recalled", "other"))
        # Every tenth step is enough to draw the curve.
        writer.writerows(
            (phase, number, f"{recalled:.4f}", f"{other:.4f}")
            for phase, number, recalled, other in losses[::10]
        )
    (out / "training.json").write_text(json.dumps(told, indent=2) + "\n")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=float, default=1.0, help="Share of the steps to take.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    phases = tuple(
        replace(phase, steps=max(int(phase.steps * arguments.steps), 1)) for phase in PHASES
    )
    train(phases, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
