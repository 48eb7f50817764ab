"""Patches are applied once, undone without a trace, and refused where vLLM is another one."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.patches import apply as applying
from kvplug.patches.apply import all_patches, apply, apply_all, undo_all, vllm_version
from kvplug.patches.record import Patch
from kvplug.selection import BACKEND_PATH

SOURCE = """
def plain(x):
    return x + 1


class Owner:
    def method(self, x):
        return x + 2

    @classmethod
    def of_class(cls, x):
        return cls.__name__, x + 3
"""
TARGETS = ["plain", "Owner.method", "Owner.of_class"]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A made-up vLLM module, and nothing applied."""
    (tmp_path / "made_up_vllm.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(applying, "_originals", {})
    yield importlib.import_module("made_up_vllm")
    del sys.modules["made_up_vllm"]


def doubling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def doubled(*args: Any) -> Any:
        return original(*args), original(*args)

    return doubled


def patch_of(name: str) -> Patch:
    """A patch of the made-up module with the right fingerprint."""
    patch = Patch(
        target=f"made_up_vllm:{name}", vllm=">=0.32,<0.33", why="w", upstream="u", remove_when="r",
        fingerprint="", wrap=doubling,
    )  # fmt: skip
    return replace(patch, fingerprint=patch.found_fingerprint())


def raw(patch: Patch) -> Any:
    """The target as it stands in its class or module."""
    owner, function = patch.owner()
    return owner.__dict__[function]


def results(module: ModuleType) -> list[Any]:
    return [module.plain(0), module.Owner().method(0), module.Owner.of_class(0)]


def test_applying_twice_is_applying_once(target: ModuleType) -> None:
    stock = results(target)
    for name in TARGETS:
        patch = patch_of(name)
        apply(patch, "0.32.0")
        once = raw(patch)
        apply(patch, "0.32.0")
        assert raw(patch) is once
    assert results(target) == [(result, result) for result in stock]


@pytest.mark.parametrize("name", TARGETS)
def test_undoing_restores_the_original_itself(
    target: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = patch_of(name)
    monkeypatch.setattr(applying, "all_patches", lambda: [patch])
    original, stock = raw(patch), results(target)
    apply_all()
    assert raw(patch) is not original
    undo_all()
    assert raw(patch) is original
    assert results(target) == stock
    undo_all()
    assert raw(patch) is original
    apply_all()
    assert raw(patch) is not original


@pytest.mark.parametrize("installed", ["0.31.9", "0.33.0", "0.33.0rc1", "1.0", "0.3.2"])
def test_another_version_is_refused(target: ModuleType, installed: str) -> None:
    patch = patch_of("plain")
    original = raw(patch)
    with pytest.raises(KvplugError) as caught:
        apply(patch, installed)
    assert installed in str(caught.value)
    assert ">=0.32,<0.33" in str(caught.value)
    assert raw(patch) is original


@pytest.mark.parametrize(
    "installed", ["0.32.0", "0.32.7", "0.32.1+cpu", "0.32.0rc2", "0.32.1.dev3"]
)
def test_versions_in_range(target: ModuleType, installed: str) -> None:
    patch = patch_of("plain")
    original = raw(patch)
    apply(patch, installed)
    assert raw(patch) is not original


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_source_is_refused(target: ModuleType, name: str) -> None:
    patch = replace(patch_of(name), fingerprint="0123456789abcdef")
    original = raw(patch)
    with pytest.raises(KvplugError) as caught:
        apply(patch, "0.32.0")
    for part in ("0123456789abcdef", patch.found_fingerprint(), patch.target, "0.32.0"):
        assert part in str(caught.value)
    assert raw(patch) is original
    assert not applying._originals


def test_a_fingerprint_follows_the_source(target: ModuleType, tmp_path: Path) -> None:
    before = [patch_of(name).fingerprint for name in TARGETS]
    assert len(set(before)) == 3
    assert all(len(fingerprint) == 16 for fingerprint in before)
    (tmp_path / "made_up_vllm.py").write_text(SOURCE.replace("x + 2", "x + 22"))
    importlib.invalidate_caches()
    sys.modules.pop("made_up_vllm")
    importlib.import_module("made_up_vllm")
    after = [patch_of(name).fingerprint for name in TARGETS]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


# ---------------------------------------------------------------- the real ones


@pytest.fixture
def unpatched() -> Iterator[None]:
    """vLLM as it comes; afterwards as it was found."""
    applied = dict(applying._originals)
    undo_all()
    yield
    undo_all()
    if applied:
        apply_all()


@pytest.mark.usefixtures("unpatched")
def test_the_installed_vllm_is_the_expected_one() -> None:
    for patch in all_patches():
        assert patch.found_fingerprint() == patch.fingerprint, patch.target


@pytest.mark.usefixtures("unpatched")
def test_all_patches_apply_once_and_undo() -> None:
    originals = {patch.target: raw(patch) for patch in all_patches()}
    apply_all()
    once = {patch.target: raw(patch) for patch in all_patches()}
    assert all(once[target] is not originals[target] for target in originals)
    apply_all()
    assert {patch.target: raw(patch) for patch in all_patches()} == once
    undo_all()
    restored = {patch.target: raw(patch) for patch in all_patches()}
    assert all(restored[target] is originals[target] for target in originals)


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("patch", all_patches(), ids=lambda patch: patch.target.split(":")[1])
def test_a_patched_target_keeps_its_kind_and_name(patch: Patch) -> None:
    original = raw(patch)
    apply(patch, vllm_version())
    owner, function = patch.owner()
    assert type(raw(patch)) is type(original)
    assert getattr(owner, function).__name__ == function
    assert getattr(owner, function).__doc__ == getattr(original, "__func__", original).__doc__


# ---------------------------------------------------------------- where they do not fit


@pytest.fixture
def platform() -> Iterator[Any]:
    """vLLM's platform class, its method restored afterwards."""
    from vllm.platforms import current_platform

    cls = type(current_platform)
    original = cls.__dict__["get_attn_backend_cls"]
    yield cls
    cls.get_attn_backend_cls = original


def custom(path: str, name: str = "CUSTOM") -> SimpleNamespace:
    return SimpleNamespace(name=name, get_path=lambda: path)


@pytest.mark.usefixtures("unpatched")
def test_only_an_engine_that_asks_for_kvplug_is_refused(platform: Any) -> None:
    from vllm.platforms import current_platform

    selector = SimpleNamespace(use_mla=False, use_sparse=False, is_mm_prefix=False)
    others = [None, custom("vllm.Cpu", "CPU_ATTN"), custom("their.Backend")]
    stock = [current_platform.get_attn_backend_cls(other, selector) for other in others]
    error = KvplugError("Made up.")
    applying.refuse_when_selected(error)
    applying.refuse_when_selected(KvplugError("A second one changes nothing."))
    assert [current_platform.get_attn_backend_cls(other, selector) for other in others] == stock
    with pytest.raises(KvplugError) as caught:
        current_platform.get_attn_backend_cls(custom(BACKEND_PATH), selector, num_heads=4)
    assert caught.value is error


@pytest.mark.usefixtures("unpatched")
def test_the_plugin_survives_another_vllm(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM goes on without kvplug; an engine that asks for it is told both versions."""
    from vllm.platforms import current_platform

    from kvplug.plugin import register

    monkeypatch.setattr(applying, "vllm_version", lambda: "0.40.1")
    register()
    assert not applying._originals
    with pytest.raises(KvplugError, match=r"0\.32.*0\.40\.1"):
        current_platform.get_attn_backend_cls(custom(BACKEND_PATH), SimpleNamespace())
