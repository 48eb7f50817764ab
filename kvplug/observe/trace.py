"""Trace: which pages each window of a request selected, in a file of JSON lines.

For the memory map (``kvplug map``) and for whoever asks why an answer came out as it did. A trace
holds prompts, so it is off unless a file is named, and only its owner can read that file. Each
traced window's last query also attends to everything, on the side: tracing costs as much as an
audit of every window, and is no thing for production traffic.

The first line says whose trace it is. A line of kind ``request`` comes before the first window of
a request; then come lines of kind ``window``, one for each layer, in the order of steps. A line of
kind ``full`` is the last one of a file that grew too large. All numbers of pages are logical, in
the request's context. A window has, for each KV head: the far pages ``selected``, the ``best`` as
many by exact attention, the shares that both hold together with sinks and local pages, and every
far page that holds 1% or more by itself (``heavy``).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvplug.errors import KvplugError
from kvplug.exact_mass import ExactAttention, Pages

if TYPE_CHECKING:
    import torch

    from kvplug.page_table import PageTable
    from kvplug.pipeline import Plan
    from kvplug.windows import Ints

logger = logging.getLogger("vllm.kvplug")

MOST_BYTES = 256 * 2**20
"""A trace ends here."""
DIGITS = 5
"""Of shares, behind the point."""
HEAVY = 0.01
"""A page with this share of a query's attention is named with it."""


def check_path(path: str) -> None:
    """Refuses a file that could not be made.

    Raises:
        KvplugError: Its folder is missing or cannot be written to.
    """
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise KvplugError(f"kvplug option trace={path!r}: there is no folder {folder}.")
    if not os.access(folder, os.W_OK):
        raise KvplugError(f"kvplug option trace={path!r}: folder {folder} is read-only.")


class Trace:
    """The file, and whose turn it is.

    Args:
        path: The file; it must not exist.
        head: What the first line says beside its kind.
        most_bytes: Where it ends.

    Raises:
        KvplugError: The file exists or cannot be made.
    """

    def __init__(self, path: str, head: dict[str, Any], most_bytes: int = MOST_BYTES) -> None:
        """Makes the file."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise KvplugError(
                f"kvplug option trace={path!r}: the file exists already; name another one."
            ) from None
        except OSError as error:
            raise KvplugError(f"kvplug option trace={path!r}: {error.strerror}.") from None
        self._file = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
        self._left = most_bytes
        self._known: set[str] = set()
        self.names: list[str] = []
        """Requests of the step, by row of the batch."""
        self.tokens_of: Callable[[int], Ints] = lambda row: np.empty(0, np.int32)
        """Token ids that are known of a row's request: its prompt, and what was decoded."""
        self.write({"kind": "head", "note": "This file holds prompts.", **head})

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line, unless the file is full; a failing disk ends the trace, not the engine."""
        if self.is_full:
            return
        text = json.dumps(line, separators=(",", ":")) + "\n"
        if len(text) > self._left:
            self._left, text = 0, '{"kind":"full"}\n'
        self._left = max(self._left - len(text), 0)
        try:
            self._file.write(text)
        except OSError as error:
            self._left = 0
            logger.warning("kvplug: the trace ends here: %s.", error.strerror)

    @property
    def is_full(self) -> bool:
        """Whether no more lines are taken."""
        return self._left <= 0

    def request(self, row: int) -> str:
        """The name of a row's request, whose line is written if it has none yet."""
        name = self.names[row]
        if name not in self._known:
            self._known.add(name)
            tokens = self.tokens_of(row).tolist()
            self.write({"kind": "request", "request": name, "tokens": tokens})
        return name


class LayerTrace:
    """One layer's ``observer``.

    Args:
        exact: Exact attention of the layer.
        trace: The file.
        layer: Its number in the model.
    """

    def __init__(self, exact: ExactAttention, trace: Trace, layer: int) -> None:
        """Holds its arguments."""
        self._exact, self._trace, self._layer = exact, trace, layer

    def __call__(self, queries: torch.Tensor, plan: Plan) -> None:
        """Writes down the step's sparse windows.

        Args:
            queries: ``[T, H, D]`` of the step.
            plan: The step's, with the layer's pages selected.
        """
        assert plan.table is not None
        if self._trace.is_full or not self._trace.names:
            return
        for s in plan.step.sparse_windows:
            self._trace.write(self._window(queries, plan.table, int(s)))

    def _window(self, queries: torch.Tensor, table: PageTable, s: int) -> dict[str, Any]:
        """One line: per KV head what was selected, what would have been best, shares."""
        windows = table.step.windows
        end, row = int(windows.context_end[s]), int(windows.request[s])
        line: dict[str, Any] = {
            "kind": "window", "request": self._trace.request(row), "layer": self._layer,
            "first": end - int(windows.num_tokens[s]), "end": end,
            "far": [int(windows.far_begin[s]), int(windows.far_end[s])],
            "selected": [], "best": [], "captured": [], "best_captured": [], "heavy": [],
        }  # fmt: skip
        if windows.num_tokens[s] == 1:
            line["token"] = self._trace.tokens_of(row)[end - 1 : end].tolist()
        for head, group in enumerate(table.step.last_queries(queries, s, table.num_kv_heads)):
            pages = Pages.of(table, s, head)
            shares = self._exact.shares(group, pages.rows, pages.context).mean(0).numpy()
            selected = (pages.attended & pages.far).nonzero()[:, 0].numpy()
            far = np.arange(*line["far"])
            best = far[np.argsort(-shares[far], kind="stable")[: pages.chosen]]
            always = shares[~pages.far.numpy()].sum()
            line["selected"].append(selected.tolist())
            line["best"].append(np.sort(best).tolist())
            line["captured"].append(round(float(always + shares[selected].sum()), DIGITS))
            line["best_captured"].append(round(float(always + shares[best].sum()), DIGITS))
            heavy = far[shares[far] >= HEAVY]
            line["heavy"].append([[int(p), round(float(shares[p]), DIGITS)] for p in heavy])
        return line
