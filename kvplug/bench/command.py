"""``kvplug bench``: what to measure, and how it is told."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvplug.bench.kernels import command as kernel_command
from kvplug.bench.speed_table import Rows, speed_table
from kvplug.config import DEFAULT_POLICY, json_object
from kvplug.console import out, progress
from kvplug.options import ChunkOption, EagerOption, JsonFlag, PageOption, group_of, numbers

benches = typer.Typer(
    cls=group_of("policies"), help="Measure; without a COMMAND: policies, by its options."
)

ModelOption = Annotated[str, typer.Option(help="recall, random, or a model's path.")]
DecodedOption = Annotated[int, typer.Option(min=8, help="Tokens decoded per request.")]
ContextsOption = Annotated[str, typer.Option(help="Prompt lengths, with commas.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Medians are of this many.")]
DenseRepeatsOption = Annotated[int, typer.Option(help="Repeats of stock vLLM; 0: as others.")]


@contextmanager
def told(as_json: bool, draw: Callable[[Rows], Table]) -> Iterator[Rows]:
    """A list that is told at the end, also where measuring breaks off: what there is counts."""
    rows: Rows = []
    try:
        yield rows
    finally:
        if rows and as_json:
            print(json.dumps(rows))
        elif rows:
            out.print(draw(rows))


@benches.command("policies")
def bench(
    model: ModelOption = "recall",
    policies: Annotated[str, typer.Option(help="Recipes, with commas.")] = DEFAULT_POLICY,
    contexts: ContextsOption = "4096,32768",
    batches: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1",
    repeats: RepeatsOption = 3,
    budget: Annotated[int, typer.Option(help="Far tokens per window and KV head.")] = 512,
    options: Annotated[str, typer.Option(help="Other kvplug options, as JSON.")] = "{}",
    page: PageOption = 32,
    chunk: ChunkOption = 4096,
    decoded: DecodedOption = 64,
    needles: Annotated[int, typer.Option(help="Questions about the longest document.")] = 0,
    dense_repeats: DenseRepeatsOption = 0,
    eager: EagerOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare recipes with stock vLLM on this machine, one engine after the other."""
    from kvplug.bench.compare import compare
    from kvplug.bench.job import Job
    from kvplug.machine import num_threads, versions

    job = Job(
        "", model, numbers(contexts), numbers(batches), repeats, page, chunk, decoded, eager,
        needles, {"budget": budget, **json_object(options, "--options")},
    )  # fmt: skip
    kinds = " ".join(f"{name} {version}" for name, version in versions().items())
    title = f"{model}, {num_threads()} threads, medians of {repeats}; {kinds}"
    with told(as_json, partial(speed_table, title, ("policy",))) as rows, progress() as say:
        compare(job, policies.split(","), dense_repeats or repeats, say, rows)


@benches.command("recipes")
def bench_recipes(
    model: ModelOption = "recall",
    policies: Annotated[
        str, typer.Option(help="Rows, with commas: recipes, named configurations, or all.")
    ] = "all",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="A row of your own, LABEL=OPTIONS, kvplug's options as JSON; as often as you like."
        ),
    ] = None,
    contexts: ContextsOption = "8192,32768,131072",
    budgets: Annotated[
        str, typer.Option(help="Far tokens per window and KV head, with commas.")
    ] = "256,512,2048",
    needles: Annotated[
        str, typer.Option(help="Questions per context, one number or one for each; 0: none.")
    ] = "100",
    mass_questions: Annotated[
        int, typer.Option(min=0, help="Questions in which captured mass is measured.")
    ] = 10,
    repeats: RepeatsOption = 3,
    dense_repeats: DenseRepeatsOption = 0,
    page: PageOption = 32,
    chunk: ChunkOption = 4096,
    decoded: DecodedOption = 64,
    eager: EagerOption = False,
    write: Annotated[
        Path | None, typer.Option(help="Markdown page to write; figures go beside it, as .json.")
    ] = None,
    redraw: Annotated[
        Path | None, typer.Option("--from", help="Figures to draw instead of measuring.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Every recipe x context x budget: recall, captured mass, speed against stock vLLM, index."""
    from kvplug.bench import document
    from kvplug.bench.job import Job
    from kvplug.bench.recipes import chosen_recipes
    from kvplug.bench.table import Plan, numbers_for

    if redraw is not None:
        document.show(document.read(redraw), write, as_json, out)
        return
    lengths = numbers(contexts)
    questions = numbers_for(lengths, numbers(needles, least=0))
    job = Job(
        "", model, lengths, [1], repeats, page, chunk, decoded, eager, needles=1, options={},
    )  # fmt: skip
    plan = Plan(
        job, chosen_recipes(policies, recipe or ()), numbers(budgets), questions, mass_questions,
        dense_repeats or repeats,
    )  # fmt: skip
    with progress() as say:
        result = document.measured(plan, shlex.join(["kvplug", *sys.argv[1:]]), write, say)
    document.show(result, write, as_json, out)
    document.check_complete(result)


@benches.command("offload")
def bench_offload(
    folder: Annotated[Path, typer.Argument(help="Folder on the disk.")],
    policy: Annotated[str, typer.Option(help="Recipe.")] = DEFAULT_POLICY,
    context: Annotated[int, typer.Option(help="Prompt length.")] = 131072,
    requests: Annotated[int, typer.Option(min=2, help="Requests that share a memory.")] = 8,
    each: Annotated[int, typer.Option(help="Prompt tokens of each of them.")] = 65536,
    repeats: RepeatsOption = 3,
    budget: Annotated[int, typer.Option(help="Far tokens per window and KV head.")] = 512,
    as_json: JsonFlag = False,
) -> None:
    """What offloading costs where tokens ask for near and for far pages, and what it buys."""
    from kvplug.bench.job import Job
    from kvplug.bench.offload import measure
    from kvplug.machine import num_threads

    job = Job(
        policy, "recall", [context], [1], repeats, 32, 4096, 64, eager=False, needles=0,
        options={"budget": budget},
    )  # fmt: skip
    title = f"{policy}, budget {budget}, {num_threads()} threads, medians of {repeats}"
    with told(as_json, partial(speed_table, title, ("cell", "cache"))) as rows, progress() as say:
        measure(job, folder, (requests, each), say, rows)


@benches.command("profile")
def bench_profile(
    model: ModelOption = "recall",
    policies: Annotated[str, typer.Option(help="Recipes or named configurations.")] = "all",
    context: Annotated[int, typer.Option(help="Prompt length.")] = 32768,
    budget: Annotated[int, typer.Option(help="Far tokens per window and KV head.")] = 512,
    page: PageOption = 32,
    chunk: ChunkOption = 4096,
    decoded: DecodedOption = 128,
    eager: EagerOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Where the time of a recipe's selection goes, beside the attention that follows it."""
    from kvplug.bench.child import results
    from kvplug.bench.job import Job
    from kvplug.bench.recipes import chosen_recipes

    rows: list[dict[str, Any]] = []
    with progress() as say:
        for recipe in chosen_recipes(policies, ()):
            recipe.config(budget, page)
            say(f"{recipe.label}: starting its engine")
            options = {key: value for key, value in recipe.options.items() if key != "policy"}
            job = Job(
                recipe.policy, model, [context], [1], 1, page, chunk, decoded, eager, 0,
                {**options, "budget": budget},
            )  # fmt: skip
            for _, data in results("kvplug.bench.profile", job, job.to_json()):
                rows.append({**data, "policy": recipe.label})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=f"{context:,} tokens, budget {budget}: seconds of the prompt, us of a step")
    for column in ("recipe", "", "total", "attention", "selection", "share", "of which"):
        table.add_column(column)
    for row in rows:
        for phase, unit in (("prefill", 1.0), ("decode", 1e6)):
            told, digits = row[phase], 2 if unit == 1.0 else 0
            stages = sorted(told["stages"].items(), key=lambda stage: -stage[1])
            table.add_row(
                row["policy"], phase,
                *(f"{told[name] * unit:.{digits}f}" for name in ("total", "attend", "select")),
                f"{told['share'] or 0:.1%}",
                ", ".join(f"{name} {value * unit:.{digits}f}" for name, value in stages),
            )  # fmt: skip
    out.print(table)


benches.command("kernels")(kernel_command(progress, out, numbers))
