"""The command ``kvplug``. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from kvplug.bench.command import benches
from kvplug.config import DEFAULT_POLICY, KvplugConfig, json_object
from kvplug.console import err, out, progress
from kvplug.errors import KvplugError
from kvplug.evals.command import command
from kvplug.loadtests.command import load_app
from kvplug.options import JsonFlag, numbers

app = typer.Typer(
    name="kvplug",
    help="Page retrieval over vLLM's KV cache, for long contexts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(benches, name="bench")


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
    positions: Annotated[str | None, option("positions")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    options: Annotated[str | None, option("options")] = None,
    offload: Annotated[str | None, option("offload")] = None,
    audit: Annotated[float | None, option("audit")] = None,
    trace: Annotated[str | None, option("trace")] = None,
) -> None:
    """Serve MODEL with vLLM's own OpenAI server; other flags go to `vllm serve` as they are."""
    from kvplug.observe.share import share_metrics

    share_metrics()  # before anything imports prometheus_client
    from kvplug.serve.endpoints import allow_endpoints
    from kvplug.serve.launch import run_vllm, vllm_arguments

    allow_endpoints()
    given = {
        "policy": policy, "budget": budget, "sink": sink, "local": local, "window": window,
        "dense_below": dense_below, "positions": positions, "seed": seed, "audit": audit,
        "trace": trace,
        "dense_layers": None if dense_layers is None else parse_layers(dense_layers),
        "options": None if options is None else json_object(options, "--options"),
        "offload": None if offload is None else json_object(offload, "--offload"),
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    run_vllm(vllm_arguments(model, chosen, context.args))


@app.command("map")
def memory_map(
    trace: Annotated[Path, typer.Argument(help="What `kvplug serve --trace FILE` wrote.")],
    request: Annotated[
        str | None, typer.Option(help="Id of a response (default: the trace's only request).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("map.html"),
    tokenizer: Annotated[
        str | None, typer.Option(help="Path or name (default: the traced model's).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw what a traced request retrieved, as one HTML page that needs no network."""
    from kvplug.serve.memory_map import write_map

    made = write_map(trace, out, request, tokenizer)
    if as_json:
        print(json.dumps(made))
    else:
        print(f"{made['out']}: {made['steps']} steps of request {made['request']}.")


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
            f"read back; hot pool, index and buffers {ours['kv_memory_gib']:.2f} GiB; the "
            f"engine's peak memory {ours['peak_rss_gib']:.2f} GiB, {ours['engine_rss_gib']:.2f} "
            f"GiB of it before the question; {attended}"
        )
    return (
        f"kvplug: first token {result['ttft_ratio']:.1f}x sooner, decode "
        f"{result['decode_ratio']:.1f}x faster, {attended}"
    )


app.command("eval")(command(progress, out, numbers))
app.add_typer(load_app(progress, out), name="load")


@app.command()
def doctor(
    offload: Annotated[
        Path | None, typer.Option(help="Folder to offload to: its room and speed, in two seconds.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Path or name of a model, for the least hot pool.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what is live and what would go wrong."""
    from kvplug.doctor import diagnose

    report = diagnose(offload, model)
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
