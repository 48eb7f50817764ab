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
BACKEND = "What vLLM on CUDA makes of them: [cuda.md](cuda.md)."
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
        parts += _compiled(document["compiled"])
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
