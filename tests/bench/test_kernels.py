"""What surrounds the timing of kernels: floors in bytes, the page, refusals, the gate."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from kvplug.bench import kernel_document, kernel_page, kernel_sections
from kvplug.bench.step_bytes import StepSize
from kvplug.errors import KvplugError
from kvplug.pages import PageGeometry
from kvplug.windows import cut_windows

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
STEP = {
    "context": 131072, "batch": 8, "budget": 2048, "dense": {"SDPA flash": 2.5e-3, "other": None},
    "dense_best": 2.5e-3, "step": 2e-4, "step_graph": 1e-4, "speedup": 25.0,
    "hash_bytes": 66_813_952, "kv_bytes": 85_983_232, "floor": 4e-5, "over_floor": 2.5,
}  # fmt: skip
SKIPPED = {
    "context": 524288,
    "batch": 32,
    "budget": 2048,
    "skipped": "needs 68 GiB, 9 GiB are free",
}
MEASURED: dict[str, Any] = {
    "command": "kvplug bench kernels --repeats 3", "versions": VERSIONS, "device": "A GPU",
    "ceiling": 3.25e12, "gate": {"checked": 84, "wrong": []}, "repeats": 3, "flashinfer": False,
    "size": StepSize(8, 131072, 2048)._asdict(),
    "kernels": [
        {"kernel": "top_pages", "seconds": 1.25e-5, "moved": 4_300_000, "bandwidth": 3.44e11,
         "share": 0.106},
    ],
    "steps": [STEP, SKIPPED],
}  # fmt: skip
INTERPRETED = {
    "command": "kvplug bench kernels --interpret", "versions": VERSIONS, "checked": 7, "wrong": [],
    "kernels": ["decode step, short contexts", "hash_scores, decode", "hash_scores, prompt",
                "top_pages"],
    "shapes": ["2 x 300 tokens", "1 x 530 tokens"],
}  # fmt: skip
COMPILED = {
    "command": "kvplug bench kernels --compile", "versions": VERSIONS,
    "rows": [
        {"file": "top_pages", "kernel": "top_pages", "variant": "fp32, CHUNK 4096, 8 warps",
         "targets": {"sm_90": {"shared": 1024, "registers": 96, "spilled": 0},
                     "gfx942": {"shared": 2048, "registers": 60, "spilled": 4}}},
    ],
}  # fmt: skip


def rows_of(text: str, first: str) -> list[list[str]]:
    """Cells of the table whose first column is called ``first``, with its heading."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_the_floor_of_the_step_that_must_be_fast() -> None:
    """By hand: 4,080 whole pages before the local region, two of them sinks."""
    size = StepSize(batch=8, context=131072, budget=2048)
    far_tokens = (4080 - 2) * 32
    assert size.hash_bytes == 8 * 8 * far_tokens * 8 == 66_813_952
    assert size.kv_bytes == 8 * 8 * (64 + 2048 + 512) * 128 * 2 * 2 == 85_983_232
    assert size.floor_bytes == size.hash_bytes + size.kv_bytes
    assert size.dense_bytes == 8 * 131072 * 8 * 128 * 2 * 2
    assert size.memory_bytes == size.dense_bytes + 8 * 8 * 131072 * 8


@pytest.mark.parametrize("budget", [0, 2048, 6144])
def test_what_is_attended_is_what_windows_of_one_token_attend_to(budget: int) -> None:
    lengths = np.array([1, 600, 3000, 4096, 4097, 8191, 70_000, 131_072], np.int32)
    geometry = PageGeometry(32, 256, 2, 512, budget // 32, 4096, budget // 32)
    windows = cut_windows(
        np.arange(len(lengths) + 1, dtype=np.int32), lengths, np.zeros(len(lengths), np.bool_),
        geometry, merge=False,
    )  # fmt: skip
    for length, sparse, begin, end in zip(
        lengths.tolist(), windows.sparse, windows.far_begin.tolist(), windows.far_end.tolist(),
        strict=True,
    ):  # fmt: skip
        size = StepSize(1, length, budget, kv_heads=1)
        far = end - begin if sparse else 0
        assert size.far_pages == far
        assert size.attended == length - (far * 32 - budget if sparse else 0)


def test_a_page_without_a_measurement_says_so_first() -> None:
    text = kernel_page.draw({"interpreted": INTERPRETED, "compiled": COMPILED})
    assert text.split("\n\n")[1].startswith("**Nothing has been measured on a GPU yet.**")
    assert "kvplug bench kernels --write docs/gpu.md" in text
    assert "compute-sanitizer --tool memcheck" in text
    assert "It has not been run yet" in text
    assert "7 checks of 2 kernels and of the step that strings them, all right" in text
    assert "2 x 300 tokens; 1 x 530 tokens" in text
    assert "us |" not in text
    assert rows_of(text, "kernel") == [
        ["kernel", "variant", "sm_90", "gfx942"],
        ["---"] * 4,
        ["`top_pages`", "fp32, CHUNK 4096, 8 warps", "96 / 0 / 1,024", "60 / 4 / 2,048"],
    ]  # fmt: skip


def test_the_page_of_a_measurement() -> None:
    text = kernel_page.draw({"measured": MEASURED})
    assert "Nothing has been measured" not in text
    assert "Measured on A GPU." in text
    assert "torch 2.11.0, triton 3.6.0; a copy moves 3,250 GB/s" in text
    assert "84 checks passed on the device" in text
    assert "FlashInfer was not installed, so it is absent." in text
    assert rows_of(text, "kernel")[2:] == [
        ["`top_pages`", "12.5 us", "4.3 MB", "344 GB/s", "11%"]
    ]  # fmt: skip
    steps = rows_of(text, "context")
    assert steps[0] == list(kernel_page.STEP_COLUMNS)
    assert steps[2] == [
        "131,072", "8", "2,048", "2.50 ms", "200.0 us", "100.0 us", "25.0x", "66.8 MB", "86.0 MB",
        "40.0 us", "2.5x",
    ]  # fmt: skip
    assert steps[3][:4] == ["524,288", "32", "2,048", "skipped: needs 68 GiB, 9 GiB are free"]
    assert "| 131,072 | 8 | 2.50 ms | failed |" in text
    assert "Medians of 3" in text


def test_the_page_does_not_miss_flashinfer_that_was_there() -> None:
    text = kernel_page.draw({"measured": MEASURED | {"flashinfer": True}})
    assert "absent" not in text


def test_a_page_is_tidy() -> None:
    text = kernel_page.draw(
        {"measured": MEASURED, "interpreted": INTERPRETED, "compiled": COMPILED}
    )
    assert text.endswith(".\n")
    assert "\n\n\n" not in text
    assert "{" not in text


def test_a_run_leaves_the_other_sections_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "gpu.md"
    kernel_document.write({"compiled": COMPILED}, path)
    kernel_document.write({"measured": MEASURED}, path)
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "compiled": COMPILED, "measured": MEASURED,
    }  # fmt: skip
    assert "## Compiled" in path.read_text()
    path.with_suffix(".json").write_text('{"rows": []}')
    with pytest.raises(KvplugError, match="must be JSON that `kvplug bench kernels` wrote"):
        kernel_document.write({"measured": MEASURED}, path)


def test_tables_on_a_terminal() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    kernel_document.show(
        {"measured": MEASURED, "compiled": COMPILED, "interpreted": INTERPRETED}, console
    )
    text = console.export_text()
    assert "7 checks in Triton's interpreter" in text
    assert "1 variants compile for sm_90, gfx942; registers are spilled in 1 of 2." in text
    assert "12.5 us" in text
    assert "25.0x" in text


def test_nothing_is_timed_when_a_kernel_is_wrong() -> None:
    wrong = {"kernel": "top_pages", "shape": "3 x 9 tokens", "error": 5.0, "allowed": 0.0}
    gate = {"wrong": [wrong | {"problem": None}, wrong | {"problem": "boom"}]}
    with pytest.raises(
        KvplugError, match=r"top_pages is wrong here at 3 x 9 tokens: error 5, allowed 0 \(1 more"
    ):
        kernel_sections.refuse_wrong(gate, "here")
    with pytest.raises(KvplugError, match=r": boom\. Nothing was timed"):
        kernel_sections.refuse_wrong({"wrong": gate["wrong"][1:]}, "here")


def test_without_a_device_there_is_one_sentence() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "kvplug.bench.kernels"],
        cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {kernel_sections.NO_DEVICE}"


def test_the_command_needs_no_vllm_and_nothing_of_it() -> None:
    program = (
        "import sys; import kvplug.bench.kernels, kvplug.bench.kernel_measure; "
        "print(sorted({'vllm', 'pydantic', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_interpreter_finds_kernels_and_the_step_right() -> None:
    """The gate's tiny shapes; with a budget of everything the step is dense attention."""
    section = kernel_sections.in_process("kvplug.bench.kernel_gate", interpreted=True)
    assert section["wrong"] == []
    steps = {name for name in section["kernels"] if name.startswith("decode step")}
    assert steps == {
        "decode step, a budget of everything", "decode step, selected pages",
        "decode step, short contexts",
    }  # fmt: skip
    assert section["checked"] == len(section["kernels"]) * len(section["shapes"])


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(KvplugError, match=r"kvplug\.bench\.nothing failed: .*No module named"):
        kernel_sections.in_process("kvplug.bench.nothing", interpreted=False)


def test_what_a_row_holds() -> None:
    from kvplug.bench.kernel_measure import does_not_fit, step_row

    size = StepSize(8, 131072, 2048)
    bandwidth = float(size.floor_bytes) / 4e-5
    row = step_row(size, {"slow": 3e-3, "none": None, "quick": 2e-3}, 2e-4, 1e-4, bandwidth)
    assert row["dense_best"] == 2e-3
    assert row["speedup"] == pytest.approx(20)
    assert row["floor"] == pytest.approx(4e-5)
    assert row["over_floor"] == pytest.approx(2.5)
    assert step_row(size, {"none": None}, 2e-4, 1e-4, bandwidth)["speedup"] is None
    # 4 GiB of keys and values, 1/16 GiB of hashes and 3 GiB to spare.
    assert does_not_fit(size, 8 * 2**30) is None
    assert does_not_fit(size, 7 * 2**30) == "needs 7.1 GiB, 7.0 GiB are free"


def test_both_ways_of_torch_are_the_same_attention() -> None:
    """On CPU, where torch has a flash backend too."""
    from kvplug.bench.dense_decode import GROUPED, SDPA, kinds

    size = StepSize(2, 70, 0, heads=6, kv_heads=2, dim=64)
    ways = kinds(size, torch.device("cpu"))
    assert torch.equal(ways[SDPA]()().flatten(), ways[GROUPED]()().flatten())


def test_a_kind_that_fails_costs_only_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvplug.bench import kernel_measure

    class Timer:
        device = torch.device("cpu")

        def seconds(self, work: Any) -> float:
            return work()

    made = {"torn": lambda: 1 / 0, "SDPA": lambda: lambda: 2.5, "FlashInfer": lambda: lambda: 1.5}
    monkeypatch.setattr(kernel_measure, "kinds", lambda *_: made)
    monkeypatch.setattr(kernel_measure, "captured", lambda work: lambda: work() / 2)
    said: list[str] = []
    timer: Any = Timer()
    seconds = kernel_measure.measure_dense(StepSize(1, 70, 0), timer, said.append)
    assert seconds == {"torn": None, "SDPA": 2.5, "SDPA, graph": 1.25, "FlashInfer": 1.5}
    assert said == ["torn failed: division by zero"]


def test_flashinfer_is_planned_for_the_pages_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in that remembers its arguments; there is no FlashInfer without a GPU."""
    from kvplug.bench import dense_decode

    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert not dense_decode.has_flashinfer()
    monkeypatch.delitem(sys.modules, "flashinfer")
    (tmp_path / "flashinfer.py").write_text(
        "class BatchDecodeWithPagedKVCacheWrapper:\n"
        "    def __init__(self, scratch, layout, use_tensor_cores):\n"
        "        self.layout = layout\n"
        "    def plan(self, starts, pages, last, *sizes, **dtypes):\n"
        "        self.planned = (self.layout, starts.tolist(), len(pages), last.tolist(), sizes)\n"
        "    def run(self, queries, cache):\n"
        "        return (*self.planned, tuple(queries.shape), tuple(cache.shape))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert dense_decode.has_flashinfer()
    size = StepSize(2, 70, 0, heads=6, kv_heads=2, dim=64)
    assert dense_decode.flashinfer(size, torch.device("cpu"))() == (
        "HND", [0, 3, 6], 6, [6, 6], (6, 2, 64, 32), (2, 6, 64), (6, 2, 2, 32, 64),
    )  # fmt: skip
    monkeypatch.delitem(sys.modules, "flashinfer")
