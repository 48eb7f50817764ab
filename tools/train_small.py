"""Trains the small model of ``kvplug/models/trained``: ``python tools/train_small.py --out DIR``.

A Llama of five million weights learns to recall from text: attention that was learnt, and so is
diffuse, beside the constructed model's exact one. Sequences are the lab's own recall tasks, packed;
random words that come twice, which is where copying is learnt first; and made-up prose. Positions
have gaps (PoSE, Zhu et al. 2024, arXiv 2309.10400), so that short sequences show all distances up
to 40,000 tokens; the last phases are long, so that attention learns to stay sharp among many keys.
Weights do not start as noise but near heads that copy (:class:`Start`), and move from there.

Everything follows from ``--seed``. Losses go to ``losses.csv``, weights and settings beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kvplug.evals.haystack import Noise, Prose
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.base import Materials
from kvplug.evals.wording import Wording
from kvplug.models.documents import random_tokens
from kvplug.models.tokenizer import build_tokenizer, vocabulary
from kvplug.models.trained_llama import GEOMETRY

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
    Phase(1200, 256, 32, 1e-3),
    Phase(600, 1024, 8, 8e-4),
    Phase(250, 4096, 2, 5e-4),
    Phase(120, 16384, 1, 3e-4),
    Phase(50, 32768, 1, 2e-4),
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


class Batches(IterableDataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Endless batches: ids ``[rows, length + 1]``, weights and positions ``[rows, length]``.

    Args:
        phase: Lengths and rows.
        seed: Where everything comes from.
    """

    def __init__(self, phase: Phase, seed: str) -> None:
        """Keeps what it was given; the tokenizer is made in the process that reads."""
        self.phase, self.seed = phase, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Batches."""
        torch.set_num_threads(1)
        tokenizer, draw = build_tokenizer(), random.Random(self.seed)
        source = sequences(Pieces(tokenizer, draw), self.phase.length, tokenizer.bos_token_id)
        while True:
            rows = [next(source) for _ in range(self.phase.batch)]
            yield (
                torch.tensor([ids for ids, _ in rows]),
                torch.tensor([weights for _, weights in rows])[:, 1:],
                torch.tensor([positions(draw, self.phase.length) for _ in rows]),
            )


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
    """The model before training; see :class:`Start`."""
    torch.manual_seed(seed)
    sizes = {key: value for key, value in GEOMETRY.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": GEOMETRY["rope_theta"]}
    config = LlamaConfig(
        vocab_size=tokens, rope_parameters=rope, attn_implementation="sdpa", use_cache=False,
        tie_word_embeddings=False, rms_norm_eps=1e-6, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        Start(model).write()
    # One matrix for both: to copy a token is then to add its embedding.
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


class Start:
    """Where training starts: weak heads that look back and that match, in the first two layers.

    From noise, heads that copy form after tens of millions of tokens (Olsson et al. 2022), hours
    here. So weights start near one solution: layer 0 copies what stood one and two tokens ago,
    layer 1 looks for where the last two tokens stood before, through random projections on slowly
    turning pairs, and copies what followed. Everything is trained from there, and all else starts
    as noise.

    Args:
        model: Written to.
    """

    CONSTANT, BETWEEN, LOGITS = 4.0, 1.0, 0.06
    """Of the coordinate that all embeddings share; spread of the others; scale of logits."""
    FAST, SLOW = 18, 37
    """Pairs that turn fast enough to tell tokens apart, and slowly enough to forget 40,000."""
    LOOK, MATCH, COPY = 8.2, 3.5, 4.0
    """Strength of looking back, of matching, and of copying."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Draws the projections."""
        self.model, hidden, dim = model, GEOMETRY["hidden_size"], GEOMETRY["head_dim"]
        self.hidden, self.dim = int(hidden), int(dim)
        self.group = int(GEOMETRY["num_attention_heads"] // GEOMETRY["num_key_value_heads"])
        # What stood before goes through one projection into places of its own.
        self.seen = torch.randn(self.dim, self.hidden) / self.hidden**0.5
        self.places = [torch.randn(self.hidden, self.dim) / self.dim**0.5 for _ in range(2)]

    def write(self) -> None:
        """Writes the embedding and two layers."""
        table = self.model.model.embed_tokens.weight
        table.normal_(0, self.BETWEEN)
        table[:, 0] = self.CONSTANT
        self.model.model.norm.weight.fill_(self.LOGITS)
        for head in range(2):
            self.look_back(head, lag=head + 1)
            self.match(head)

    def look_back(self, head: int, lag: int) -> None:
        """Layer 0, one KV head and its query heads: position alone."""
        attention = self.model.model.layers[0].self_attn
        turns = GEOMETRY["rope_theta"] ** (-torch.arange(self.FAST) / (self.dim // 2)) * lag
        cosines, sines = self.rows(head, 0, self.FAST), self.rows(head, 1, self.FAST)
        strength = self.LOOK / self.CONSTANT
        for query in range(self.group):
            shift = (head * self.group + query - head) * self.dim
            attention.q_proj.weight[cosines + shift, 0] = strength * turns.cos()
            attention.q_proj.weight[sines + shift, 0] = -strength * turns.sin()
        attention.k_proj.weight[cosines, 0] = strength
        mine = slice(head * self.dim, (head + 1) * self.dim)
        attention.v_proj.weight[mine] = self.seen
        attention.v_proj.weight[mine, 0] = 0  # what all tokens share says nothing
        self.out(attention, head, self.places[head])

    def match(self, head: int) -> None:
        """Layer 1: the last two tokens against the two before each position."""
        attention = self.model.model.layers[1].self_attn
        slow = torch.arange(self.SLOW, self.dim // 2)
        rows = torch.cat([slow, slow + self.dim // 2])
        now, before = (torch.randn(len(rows), self.dim) / self.dim**0.5 for _ in range(2))
        first, second = (place.T / 2 for place in self.places)
        asked = self.MATCH * (now @ self.seen + before @ first)
        for query in range(self.group):
            attention.q_proj.weight[rows + (head * self.group + query) * self.dim] = asked
        found = self.MATCH * (now @ first + before @ second)
        attention.k_proj.weight[rows + head * self.dim] = found
        half = torch.eye(self.hidden)[head * self.dim : (head + 1) * self.dim]
        attention.v_proj.weight[head * self.dim : (head + 1) * self.dim] = half
        self.out(attention, head, self.COPY * half.T)

    def rows(self, head: int, half: int, count: int) -> torch.Tensor:
        """Rows of a KV head's first or second halves of pairs."""
        return head * self.dim + half * self.dim // 2 + torch.arange(count)

    def out(self, attention: torch.nn.Module, head: int, columns: torch.Tensor) -> None:
        """Output columns of a KV head's query heads, together ``columns``."""
        for query in range(self.group):
            start = (head * self.group + query) * self.dim
            attention.o_proj.weight[:, start : start + self.dim] = columns / self.group


def train(phases: tuple[Phase, ...], seed: int, out: Path) -> None:
    """Trains, and writes weights, losses and what they were made with."""
    model = new_model(len(vocabulary()), seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98), lr=0.0, fused=True,
    )  # fmt: skip
    loss_of = torch.compile(token_losses, dynamic=False)
    start = time.perf_counter()
    losses: list[tuple[int, int, float, float]] = []
    out.mkdir(parents=True, exist_ok=True)
    for number, phase in enumerate(phases):
        # Sequences are made in a process of their own: a sixth of a step, in the steps' shadow.
        batches = iter(
            DataLoader(
                Batches(phase, f"{seed}-{number}"), batch_size=None, num_workers=1,
                prefetch_factor=8, multiprocessing_context="spawn",
            )
        )  # fmt: skip
        for done in range(phase.steps):
            warm = min(1.0, len(losses) / WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = phase.rate * warm * (1 - 0.9 * done / phase.steps)
            losses.append((number, len(losses), *step(model, optimizer, loss_of, *next(batches))))
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


def token_losses(
    model: LlamaForCausalLM, ids: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy of every token but the first, ``[rows, length]``.

    Layer by layer: the model's own forward takes a gap between positions for the end of a document
    that was packed with others, and hides what is before it.
    """
    body = model.model
    with torch.autocast("cpu", torch.bfloat16):
        hidden = body.embed_tokens(ids[:, :-1])
        turns = body.rotary_emb(hidden, position_ids=places)
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
        logits = model.lm_head(body.norm(hidden))
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view_as(places)


def step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss_of: Callable[..., torch.Tensor],
    ids: torch.Tensor, weights: torch.Tensor, places: torch.Tensor,
) -> tuple[float, float]:  # fmt: skip
    """One step; mean losses of recalled tokens and of all others."""
    loss = loss_of(model, ids, places)
    optimizer.zero_grad()
    ((loss * weights).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    recalled, told = weights == 1, loss.detach()
    return float(told[recalled].mean()), float(told[~recalled].mean())


def save(
    model: LlamaForCausalLM, out: Path, losses: list[tuple[int, int, float, float]],
    told: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the weights, the losses and how they came about."""
    weights = {
        name: value for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    stored = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
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
