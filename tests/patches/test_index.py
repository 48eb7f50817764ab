"""Every patch has a complete record in a file of its own, and a vLLM range like kvplug's own."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from kvplug.patches.apply import all_patches
from kvplug.patches.record import Patch

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(
    path.stem
    for path in (ROOT / "patches").glob("*.py")
    if path.stem not in ("apply", "record")
)  # fmt: skip


@pytest.mark.parametrize("patch", all_patches(), ids=lambda patch: patch.target.split(":")[1])
def test_records_are_complete(patch: Patch) -> None:
    assert all(getattr(patch, field.name) for field in fields(patch))
    assert patch.target.startswith("vllm.")
    assert len(patch.fingerprint) == 16
    int(patch.fingerprint, 16)
    for text in (patch.why, patch.remove_when):
        assert text.endswith(".")
    assert patch.upstream.startswith(("https://github.com/vllm-project/vllm/", "none known"))
    assert callable(patch.wrap)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_are_patched_once_each(device: str) -> None:
    targets = [patch.target for patch in all_patches(device)]
    assert len(targets) == len(set(targets))


def test_every_file_is_applied() -> None:
    """A patch that nobody applies is a rule that nobody keeps."""
    listed = {patch.target for device in ("cpu", "cuda") for patch in all_patches(device)}
    for name in FILES:
        module = importlib.import_module(f"kvplug.patches.{name}")
        assert module.PATCHES
        assert {patch.target for patch in module.PATCHES} <= listed, name


def test_ranges_are_that_of_the_package() -> None:
    pinned = re.findall(r'"vllm(?:-cpu)?(>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(pinned) == 2
    for patch in all_patches():
        assert {SpecifierSet(patch.vllm)} == set(map(SpecifierSet, pinned))
