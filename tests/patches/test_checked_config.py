"""The platform whose build is not here is patched where its source says."""

from __future__ import annotations

import ast
import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from kvplug.patches.checked_config import PATCHES, TARGETS


def function_source(target: str) -> str:
    """Source of ``module:Class.function``, decorators and all, without importing the module."""
    module, _, path = target.partition(":")
    owner, name = path.split(".")
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    text = file.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == name:
                    first = min([each.lineno, *(d.lineno for d in each.decorator_list)])
                    return "".join(text.splitlines(keepends=True)[first - 1 : each.end_lineno])
    raise AssertionError(f"no {target}")


@pytest.mark.parametrize("device", sorted(TARGETS))
def test_fingerprints(device: str) -> None:
    target, fingerprint = TARGETS[device]
    source = function_source(target)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == fingerprint


def test_this_platform_is_the_one_that_is_patched() -> None:
    owner, _ = PATCHES[0].owner()
    assert issubclass(type(current_platform), owner)
