"""vLLM's own server with kvplug's two flags filled in."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError

BACKEND_FLAGS = ("--attention-backend", "--attention_backend")
CONFIG_FLAGS = ("--additional-config", "--additional_config")


def vllm_arguments(model: str, options: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    """Arguments of ``vllm`` that serve ``model`` with retrieval.

    Args:
        model: Path or Hugging Face name.
        options: kvplug's options, as the user gave them; checked here.
        extra: Flags of ``vllm serve``, passed through.

    Raises:
        KvplugError: Bad options, or a flag that kvplug fills in itself.
    """
    KvplugConfig.parse(options)
    passed, additional = _take_additional_config(extra)
    for argument in passed:
        if argument.partition("=")[0] in BACKEND_FLAGS:
            raise KvplugError(f"kvplug serve sets {BACKEND_FLAGS[0]} itself; leave it out.")
    if "kvplug" in additional:
        raise KvplugError(
            "Give kvplug's options as flags of kvplug serve, not in --additional-config."
        )
    additional["kvplug"] = dict(options)
    filled_in = [BACKEND_FLAGS[0], "CUSTOM", CONFIG_FLAGS[0], json.dumps(additional)]
    return ["serve", model, *filled_in, *passed]


def _take_additional_config(extra: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits the user's own ``--additional-config`` from the other flags."""
    passed: list[str] = []
    raw = "{}"
    arguments = iter(extra)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in CONFIG_FLAGS:
            raw = value if equals else next(arguments, "")
        else:
            passed.append(argument)
    try:
        additional = json.loads(raw)
    except ValueError:
        additional = None
    if not isinstance(additional, dict):
        raise KvplugError(f"--additional-config must be a JSON object, not {raw!r}.")
    return passed, additional


def run_vllm(arguments: Sequence[str]) -> None:
    """Runs ``vllm`` in this process, until it ends.

    Raises:
        KvplugError: kvplug refuses the engine; whatever vLLM wrapped it in is taken off.
        SystemExit: As vLLM exits.
    """
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    try:
        main()
    except Exception as error:
        refusal = find_refusal(error)
        if refusal is None:
            raise
        raise refusal from None


def find_refusal(error: BaseException | None) -> KvplugError | None:
    """The KvplugError that an exception is, wraps or was caused by."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, KvplugError):
            return error
        problems = error.errors() if hasattr(error, "errors") else ()
        for problem in problems:
            inner = problem.get("ctx", {}).get("error")
            if isinstance(inner, KvplugError):
                return inner
        error = error.__cause__ or error.__context__
    return None
