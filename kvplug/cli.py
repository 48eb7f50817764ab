"""The command ``kvplug``. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvplug.bench.kernels import command as kernel_command
from kvplug.config import DEFAULT_POLICY, KvplugConfig, json_object
from kvplug.errors import KvplugError
from kvplug.evals.command import command
from kvplug.loadtests.command import load_app
from kvplug.options import ChunkOption, EagerOption, JsonFlag, PageOption, group_of

app = typer.Typer(
    name="kvplug",
    help="Page retrieval over vLLM's KV cache, for long contexts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


benches = typer.Typer(
    cls=group_of("policies"), help="Measure; without a COMMAND: policies, by its options."
)
app.add_typer(benches, name="bench")

ModelOption = Annotated[str, typer.Option(help="recall, random, or a model's path.")]
DecodedOption = Annotated[int, typer.Option(min=8, help="Tokens decoded per request.")]
ContextsOption = Annotated[str, typer.Option(help="Prompt lengths, with commas.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Medians are of this many.")]
DenseRepeatsOption = Annotated[int, typer.Option(help="Repeats of stock vLLM; 0: as others.")]


def main() -> None:
    """Runs the command line; what a user can put right is one sentence and exit code 2."""
    try:
        app()
    except KvplugError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


def option(name: str) -> Any:
    """A command-line option whose name, default and help are those of a config field."""
    field = KvplugConfig.model_fields[name]
    default = field.get_default(call_default_factory=True)
    text = f"{field.description} (default {default})"
    return typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)


def parse_layers(text: str) -> Any:
    """``auto``, or layer numbers with commas."""
    if text == "auto":
        return text
    try:
        return [int(number) for number in text.split(",") if number]
    except ValueError:
        raise KvplugError(f"--dense-layers {text!r} must be auto or numbers like 0,1.") from None


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; the function it gives changes the text."""
    with err.status("starting") as status:

        def say(text: str) -> None:
            status.update(escape(text))
            if not err.is_terminal:
                err.print(escape(text), highlight=False, soft_wrap=True)

        yield say


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Path or Hugging Face name of a model.")],
    policy: Annotated[str | None, option("policy")] = None,
    budget: Annotated[int | None, option("budget")] = None,
    sink: Annotated[int | None, option("sink")] = None,
    local: Annotated[int | None, option("local")] = None,
    window: Annotated[int | None, option("window")] = None,
    dense_below: Annotated[int | None, option("dense_below")] = None,
    dense_layers: Annotated[str | None, option("dense_layers")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    options: Annotated[str | None, option("options")] = None,
    offload: Annotated[str | None, option("offload")] = None,
) -> None:
    """Serve MODEL with vLLM's own OpenAI server; other flags go to `vllm serve` as they are."""
    from kvplug.observe.share import share_metrics

    share_metrics()  # before anything imports prometheus_client
    from kvplug.serve.launch import run_vllm, vllm_arguments

    given = {
        "policy": policy, "budget": budget, "sink": sink, "local": local, "window": window,
        "dense_below": dense_below, "seed": seed,
        "dense_layers": None if dense_layers is None else parse_layers(dense_layers),
        "options": None if options is None else json_object(options, "--options"),
        "offload": None if offload is None else json_object(offload, "--offload"),
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    run_vllm(vllm_arguments(model, chosen, context.args))


@app.command()
def demo(
    context: Annotated[int, typer.Option(help="Length of the document in tokens.")] = 32768,
    policy: Annotated[str, typer.Option(help="Recipe.")] = DEFAULT_POLICY,
    budget: Annotated[int, typer.Option(help="Far tokens per window and KV head.")] = 512,
    offload: Annotated[
        Literal["disk"] | None,
        typer.Option(help="Keep the cache on a disk, and ask kvplug alone."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where on the disk (default: the temporary folder).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask stock vLLM and kvplug the same question about one long document."""
    from kvplug.demo import demo as run

    with progress() as say:
        result = run(context, policy, budget, say, offload, folder)
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{context:,} tokens, {result['threads']} threads: {result['question']}")
    for column in ("", "answer", "right", "first token", "decode"):
        table.add_column(column)
    for name, run_ in result["runs"].items():
        if run_ is not None:
            table.add_row(
                name, run_["answer"], "yes" if run_["correct"] else "[red]no",
                f"{run_['ttft_s']:.2f} s", f"{run_['decode_tok_s']:.1f} tok/s",
            )  # fmt: skip
    out.print(table)
    out.print(demo_words(result), highlight=False)


def demo_words(result: dict[str, Any]) -> str:
    """What the demonstration showed, in a sentence."""
    attended = f"{result['pages_attended_share']:.1%} of the pages attended."
    ours = result["runs"]["kvplug"]
    if result["runs"]["dense"] is None:
        return (
            f"kvplug: {ours['kv_gib']:.2f} GiB of KV on disk, {ours['bytes_read_gib']:.2f} GiB "
            f"read back; the engine's peak memory {ours['peak_rss_gib']:.2f} GiB, "
            f"{ours['engine_rss_gib']:.2f} GiB of it before the question; {attended}"
        )
    return (
        f"kvplug: first token {result['ttft_ratio']:.1f}x sooner, decode "
        f"{result['decode_ratio']:.1f}x faster, {attended}"
    )


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
    with progress() as say:
        rows = compare(job, policies.split(","), dense_repeats or repeats, say)
    if as_json:
        print(json.dumps(rows))
        return
    kinds = " ".join(f"{name} {version}" for name, version in versions().items())
    table = Table(title=f"{model}, {num_threads()} threads, medians of {repeats}; {kinds}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)


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


def numbers(text: str, least: int = 1) -> list[int]:
    """Integers from ``1,2,3``, positive unless zero is let in."""
    try:
        values = [int(part) for part in text.split(",") if part]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise KvplugError(f"{text!r} must be positive whole numbers with commas between them.")
    return values


benches.command("kernels")(kernel_command(progress, out, numbers))
app.command("eval")(command(progress, out, numbers))
app.add_typer(load_app(progress, out), name="load")


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what is live and what would go wrong."""
    from kvplug.doctor import diagnose

    report = diagnose()
    if as_json:
        print(json.dumps({key: value for key, value in report.items() if key != "checks"}))
    else:
        table = Table(title="kvplug doctor")
        for column in ("check", "found", "problem"):
            table.add_column(column)
        for check in report["checks"]:
            table.add_row(check["name"], check["found"], f"[red]{check['problem'] or ''}")
        out.print(table)
    raise typer.Exit(1 if report["problems"] else 0)
