"""The memory map: one page that shows what a request retrieved of its context, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvplug.errors import KvplugError

TEMPLATE = Path(__file__).with_name("memory_map.html")
PLACE = "/*DATA*/"
SHOWN = 5
"""Requests that a message names."""


class Traced(NamedTuple):
    """One request of a trace."""

    head: dict[str, Any]
    """The first line."""
    request: str
    tokens: list[int]
    """Its prompt, and what was decoded before it was first traced."""
    windows: list[dict[str, Any]]
    """Lines of its windows, in order."""
    is_cut: bool
    """Whether the file was full before the request's end, maybe."""


def read_trace(path: Path, request: str | None = None) -> Traced:
    """One request's lines.

    Args:
        path: The trace.
        request: Its name, or the beginning of it, such as the id of its response. None: the
            trace's only one.

    Raises:
        KvplugError: No trace, or not one request of it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            # A server may be writing still: a line without an end is not there yet.
            lines = [json.loads(text) for text in file if text.endswith("\n")]
    except OSError as error:
        raise KvplugError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError:
        raise KvplugError(
            f"{path} is no trace of kvplug's: it is not made of JSON lines."
        ) from None
    if not lines or not isinstance(lines[0], dict) or lines[0].get("kind") != "head":
        raise KvplugError(f"{path} is no trace of kvplug's: its first line is not a head.")
    tokens = {line["request"]: line["tokens"] for line in lines if line["kind"] == "request"}
    name = _choose(path, list(tokens), request)
    windows = [line for line in lines if line["kind"] == "window" and line["request"] == name]
    return Traced(lines[0], name, tokens[name], windows, lines[-1]["kind"] == "full")


def _choose(path: Path, names: Sequence[str], wanted: str | None) -> str:
    """The one name that is meant.

    Raises:
        KvplugError: None is, or several are.
    """
    if not names:
        raise KvplugError(
            f"{path} holds no request: none had a context long enough to be retrieved from."
        )
    found = [name for name in names if wanted is None or name.startswith(wanted)]
    if wanted in found:
        return wanted
    if len(found) == 1:
        return found[0]
    listed = ", ".join(names[-SHOWN:])
    if not found:
        raise KvplugError(f"{path} has no request {wanted!r}; its last ones: {listed}.")
    raise KvplugError(f"{path} has {len(found)} such requests; name one: {listed}.")


def map_data(traced: Traced, tokenizer: Any) -> dict[str, Any]:
    """What the page draws.

    Args:
        traced: From :func:`read_trace`.
        tokenizer: Decodes token ids.
    """
    page, tokens = int(traced.head["page"]), list(traced.tokens)
    for line in traced.windows:
        if line.get("token") and line["end"] == len(tokens) + 1:
            tokens += line["token"]
    steps: dict[int, dict[str, Any]] = {}
    fields = ("selected", "best", "captured", "best_captured", "heavy")
    for line in traced.windows:
        step = steps.setdefault(
            line["end"],
            {
                "first": line["first"],
                "end": line["end"],
                "far": line["far"],
                "decoded": "token" in line,
                "text": tokenizer.decode(tokens[line["first"] : line["end"]]),
                "layers": {},
            },
        )
        step["layers"][line["layer"]] = {name: line[name] for name in fields}
    starts = range(0, len(tokens), page)
    return {
        "head": traced.head,
        "request": traced.request,
        "cut": traced.is_cut,
        "prompt": len(traced.tokens),
        "pages": [tokenizer.decode(tokens[start : start + page]) for start in starts],
        "steps": [steps[end] for end in sorted(steps)],
    }


def render(data: dict[str, Any]) -> str:
    """The page, which needs nothing beside itself."""
    # Nothing in a document may end the script that holds it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    before, after = template.split(PLACE)
    return before + text + after


def load_tokenizer(name: str) -> Any:
    """The tokenizer that a trace's model has.

    Raises:
        KvplugError: It is not here.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        words = str(error).splitlines()[0]
        raise KvplugError(f"Cannot load the tokenizer of {name}: {words} (--tokenizer)") from None


def write_map(trace: Path, out: Path, request: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Makes the page of one request.

    Args:
        trace: The trace.
        out: The page; what was there is replaced.
        request: See :func:`read_trace`.
        tokenizer: Path or name; None: the trace's model's.

    Returns:
        ``request``, ``context_tokens``, ``steps``, ``layers``, ``out``.

    Raises:
        KvplugError: See :func:`read_trace`; or the page cannot be written.
    """
    traced = read_trace(trace, request)
    if not traced.windows:
        raise KvplugError(f"{trace} has no window of request {traced.request}.")
    data = map_data(traced, load_tokenizer(tokenizer or str(traced.head["model"])))
    try:
        out.write_text(render(data), encoding="utf-8")
    except OSError as error:
        raise KvplugError(f"Cannot write {out}: {error.strerror}.") from None
    return {
        "request": traced.request,
        "context_tokens": data["steps"][-1]["end"],
        "steps": len(data["steps"]),
        "layers": traced.head["layers"],
        "out": str(out),
    }
