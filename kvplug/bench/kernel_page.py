"""``docs/gpu.md``: what is known of the kernels, measured or not, as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]
"""Sections, each with the ``command`` and ``versions`` that made it: ``measured``,
``interpreted``, ``compiled``. One that is absent was not made."""

NOT_MEASURED = """\
**Nothing has been measured on a GPU yet.** The kernels have run in Triton's interpreter and \
have been compiled for GPUs. No speed in this repository is a GPU's, and none is promised."""
MEASURED = "Measured on {device}."
FILLING = """\
## How to fill this page

On a machine with an NVIDIA or AMD GPU:

    kvplug bench kernels --write docs/gpu.md

It checks every kernel against its twin on the device first and times nothing if one is wrong. \
vLLM is not needed: `python -m kvplug.bench.kernels` takes the same options where only torch, \
Triton, typer and rich are installed. `--json` prints the figures, which also lie beside \
the page, as `gpu.json`. `--interpret` and `--compile` verify on any machine what needs no GPU; a \
run leaves what others wrote as it is. FlashInfer is measured where it can be imported."""
BACKEND = """\
## The backend for CUDA

**It has never run on a GPU**, and logs a warning that says so when an engine starts with it. On \
vLLM's CUDA platform `--attention-backend CUSTOM` is a subclass of vLLM's Triton attention \
(`kvplug/attention/device/`). Its classes have run in Triton's interpreter on CPU tensors, with \
metadata and caches made by hand in vLLM's layouts: there they select the pages that the pipeline \
on CPU selects, and what they attend to agrees with float64 (`tests/attention/device/`). vLLM's \
model runner, its compiler and its own Triton kernel were not part of that.

* Policies `channels`, `quest`, `simhash`, `hcam` (with `merge` `exact`), `infllm`, `actqkv`, \
`hax`, `streaming` and `dense`, and their stages in any combination, with any probe or several \
and with any budget but `recall`; pages of 32, 64 or 128 tokens; heads of 64, 80, 96, 128 or 256; \
bfloat16 and float16. Refused in one sentence: other stages, offload to disk, audits, traces, \
speculative decoding, microbatches, context parallelism, quantised caches, and requests that ask \
for a budget of their own.
* Selected pages are attended to by kvplug's own kernel, or with `attend` among the recipe's \
options set to `flash` by vLLM's FlashAttention, or to `xformers` by xformers' Triton kernel, \
both through a view of single heads' pages. Of FlashAttention only a stand-in was ever called; \
xformers' kernel ran in Triton's interpreter: that of 3.7.1 as it is, that of 3.9 with block \
pointers of the tests, for it has none (`tests/attention/device/test_xformers.py`).
* `xformers` needs `pip install 'kvplug[xformers]'` (0.0.35, wheels for x86-64) and a Triton \
before 3.9, which dropped the block pointers that its kernel is written with; the CUDA build of \
torch 2.13 comes with 3.7.1. It takes heads of 64, 128 or 256 and no models that cap logits. It \
is called once a layer where pages are head-major and once a KV head where they are token-major, \
for decoded tokens and for windows of several, which go in pieces of 16 tokens.
* The host cuts windows from lengths, and reads neither block tables nor slots nor scores back. \
Windows that attend to everything are vLLM's own kernel's, beside sparse ones by themselves.
* Keys are summarised as they are written, so contexts below `dense_below` pay for that too; the \
bounds of `quest` and the means of `hcam`, when a page's last token is.
* Probe `activation` watches every step, dense ones too: the host says from lengths which windows \
carry statistics from page to page, and where, in logical pages; a step of decoded tokens has \
such windows once or twice in `window` tokens of each request. They are pooled one after the \
other, a program a query head, for a request may begin with pages that the same step fills.
* Budget `entropy` shares the budget of all layers by one call a step, for decoded tokens' \
densities are known before the first layer. Counts of pages stay on the GPU. Their sum, for \
`kvplug:pages_attended`, starts towards the host at the end of every step and is read without \
waiting, so that metrics may lag by a step.
* `infllm`, `actqkv` and `hax` watch every step too, for every 32nd query by its position gives \
mass to the keys of its local region; the host knows from lengths which windows have one, and \
most steps that decode have none. Each window's is computed by itself, and added by a program a \
KV head, in order. Pages are settled before windows are scored: the device looks at a number of \
every far page of every window, and settles those that it finds open.
* The index is allocated in full: with heads of 128, pages of 32 and 16-bit caches, `channels` \
takes 7.0% of the bytes of keys and values, `quest` and `hcam` 3.1%, `infllm` 2.4%, `simhash` \
1.6%. `hax` keeps means of a request's first window on any page: with 4 query heads a KV head it \
takes 18% with pages of 32 tokens, 6.3% with pages of 128. Probe `activation` keeps its \
statistics on any page too: with 4 query heads a KV head, 25% with pages of 32 tokens, 6.3% with \
pages of 128. vLLM does not count it: lower `--gpu-memory-utilization`.
* With `offload` to tier `host` the paged cache lies in pinned memory of the host, and each layer \
has a hot pool on the GPU, which kernels keep: they look up what rows list, take the slots that \
were used longest ago, copy and rewrite, and the host sees none of it \
([offload.md](offload.md#on-cuda)).
* CUDA graphs: with `"graphs": true` among the recipe's options, for `channels`, `quest`, \
`simhash` and `streaming` with fixed budgets, steps of decoded tokens are declared fit for them. \
Such a step launches 3 to 9 kernels a layer with nothing from the host among them. Every token \
then selects pages by kvplug's kernels, also where its context attends to everything, with room \
for the longest context. No GPU has captured one: in tests a stand-in calls the same kernels \
again on the same memory, and what is replayed is what the pipeline on CPU selects, and to the \
bit what the same step gives without a graph (`tests/attention/device/test_decode_plan.py`); \
vLLM's second model runner captures and replays such graphs of the recall model with the answers \
of the CPU backend (`tests/engine/test_pretended_cuda.py`). So the default is off: attention then \
runs between vLLM's graphs of the rest (vLLM turns its default, `FULL_AND_PIECEWISE`, into \
`PIECEWISE` and says so).
* Kernels are compiled when they are first called. Windows whose scores are not finite are not \
counted.
* After a preemption vLLM's second model runner reads decoded tokens back as if they were prompt, \
in windows, so such a request may get another answer than it would have got."""
SANITIZER = """\
## Memory errors

compute-sanitizer runs the same gate, which calls every kernel at every shape and times nothing:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m kvplug.bench.kernel_gate

Without torch's caching every tensor is an allocation of its own, so that reading past one is \
seen. Its other tools are `racecheck`, `initcheck` and `synccheck`. {sanitized}"""
READING = """\
### How to read it

* **moved**: bytes that a kernel must read and write, each once; **of copy**: its bandwidth as a \
share of what a copy of 1 GiB reaches, bytes read and written counted.
* **dense**: attention to everything, the fastest of the kinds below; **step**: hash the new keys, \
hash the queries, score the far pages, select and write page tables, attend. Of one layer.
* **floor**: hashes of all far tokens, and keys and values of the attended ones, at the copy's \
bandwidth.
* Medians of {repeats}; the L2 cache is overwritten before every run. Single launches wait behind \
that, which hides some of the host's time; graphs have none."""
INTERPRETED = """\
## Verified in Triton's interpreter

{checked} checks of {kernels} kernels and of the step that strings them, {wrong}, by

    {command}

with {versions}. Shapes: {shapes}. Integer and copy kernels agree with their twins to the bit; the \
others err at most twice as much as plain torch against float64, with room for two roundings of \
the largest number. A step whose budget covers everything agrees with dense attention in float64. \
`tests/kernels/` tries many more shapes: page sizes 16 to 128, head sizes 64 to 256, groups of 1 \
to 8."""
COMPILED = """\
## Compiled

By `{command}` with {versions}, which needs no GPU: registers per thread / what was spilled of \
them (bytes; on AMD GPUs vector registers) / bytes of shared memory per program."""
OTHER_TRITONS = """\
With torch 2.11.0 and Triton 3.6.0, and with torch 2.13.0 and Triton 3.7.1, which is what its CUDA \
build brings, the same 84 checks were right and the same 91 variants compiled, by the same \
command; of 273 programs four and three spill there, 8 to 96 bytes. Triton 3.6.0's interpreter \
needs a numpy before 2.4 (2.2.6 was used)."""


def draw(document: Document) -> str:
    """The page.

    Args:
        document: As ``kvplug bench kernels --json`` prints it.
    """
    measured = document.get("measured")
    status = MEASURED.format(**measured) if measured else NOT_MEASURED
    parts = ["# Kernels on GPUs", status, BACKEND, FILLING]
    if measured:
        parts += _measured(measured)
    if "interpreted" in document:
        parts.append(_interpreted(document["interpreted"]))
    if "compiled" in document:
        parts += [*_compiled(document["compiled"]), OTHER_TRITONS]
    sanitized = "It has not been run yet, for want of a GPU." if not measured else ""
    parts.append(SANITIZER.format(sanitized=sanitized).rstrip())
    return "\n\n".join(parts) + "\n"


def _measured(section: Mapping[str, Any]) -> list[str]:
    """Tables of what was timed."""
    facts = (
        f"{section['device']}, {_versions(section)}; a copy moves "
        f"{section['ceiling'] / 1e9:,.0f} GB/s. By"
    )
    absent = "" if section["flashinfer"] else " FlashInfer was not installed, so it is absent."
    size = section["size"]
    return [
        "## Measured", facts, f"    {section['command']}",
        f"The gate: {section['gate']['checked']} checks passed on the device.",
        "### Kernels", f"{size['batch']} contexts of {size['context']:,} tokens.",
        table(KERNEL_COLUMNS, map(kernel_cells, section["kernels"])),
        "### The decode attention step",
        f"{size['heads']}/{size['kv_heads']} heads of {size['dim']}, pages of {size['page']}, "
        f"bf16, sink {size['sink']}, local {size['local']}; everything is attended up to "
        f"{size['dense_below']:,} tokens.{absent}",
        table(STEP_COLUMNS, map(step_cells, section["steps"])),
        "### Kinds of dense attention", dense_table(section["steps"]),
        READING.format(repeats=section["repeats"]),
    ]  # fmt: skip


KERNEL_COLUMNS = ("kernel", "time", "moved", "bandwidth", "of copy")
STEP_COLUMNS = (
    "context", "batch", "budget", "dense", "step, single launches", "step, graph", "faster",
    "hashes", "KV", "floor", "over floor",
)  # fmt: skip


def kernel_cells(row: Mapping[str, Any]) -> list[str]:
    """A kernel's cells, under KERNEL_COLUMNS."""
    return [
        f"`{row['kernel']}`", _time(row["seconds"]), _bytes(row["moved"]),
        f"{row['bandwidth'] / 1e9:,.0f} GB/s", f"{row['share']:.0%}",
    ]  # fmt: skip


def step_cells(row: Mapping[str, Any]) -> list[str]:
    """A step's cells, under STEP_COLUMNS; what was skipped says why."""
    named = [f"{row['context']:,}", str(row["batch"]), f"{row['budget']:,}"]
    if "skipped" in row:
        return [*named, f"skipped: {row['skipped']}", *[""] * (len(STEP_COLUMNS) - 4)]
    speedup = row["speedup"]
    return [
        *named, _time(row["dense_best"]), _time(row["step"]), _time(row["step_graph"]),
        "" if speedup is None else f"{speedup:.1f}x", _bytes(row["hash_bytes"]),
        _bytes(row["kv_bytes"]), _time(row["floor"]), f"{row['over_floor']:.1f}x",
    ]  # fmt: skip


def dense_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Each kind's time at each context and batch."""
    found = {(row["context"], row["batch"]): row["dense"] for row in rows if "dense" in row}
    kinds = list(dict.fromkeys(kind for dense in found.values() for kind in dense))
    cells = (
        [f"{context:,}", str(batch), *(_time(dense.get(kind)) for kind in kinds)]
        for (context, batch), dense in found.items()
    )
    return table(("context", "batch", *kinds), cells)


def _interpreted(section: Mapping[str, Any]) -> str:
    """What the interpreter verified."""
    wrong = section["wrong"]
    found = ", ".join(f"{row['kernel']} at {row['shape']}" for row in wrong)
    return INTERPRETED.format(
        checked=section["checked"],
        kernels=len({name.split(",")[0] for name in section["kernels"]} - {"decode step"}),
        wrong=f"of which these are wrong: {found}" if wrong else "all right",
        command=section["command"], versions=_versions(section),
        shapes="; ".join(section["shapes"]),
    )  # fmt: skip


def _compiled(section: Mapping[str, Any]) -> list[str]:
    """What each kernel takes of a multiprocessor."""
    rows = section["rows"]
    targets = list(rows[0]["targets"]) if rows else []
    text = COMPILED.format(command=section["command"], versions=_versions(section))
    return [text, table(("kernel", "variant", *targets), (_usage(row, targets) for row in rows))]


def _usage(row: Mapping[str, Any], targets: Iterable[str]) -> list[str]:
    """A variant's cells."""
    cells = [f"`{row['kernel']}`", row["variant"]]
    for target in targets:
        taken = row["targets"][target]
        cells.append(f"{taken['registers']} / {taken['spilled']} / {taken['shared']:,}")
    return cells


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines)


def _versions(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in section["versions"].items())


def _time(seconds: float | None) -> str:
    """Microseconds, or milliseconds from one on; failed where there is none."""
    if seconds is None:
        return "failed"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _bytes(count: int) -> str:
    """Megabytes."""
    return f"{count / 1e6:,.1f} MB"
