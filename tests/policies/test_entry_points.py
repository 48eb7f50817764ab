"""Recipes of other packages, found by the entry-point group ``kvplug.policies``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug.errors import KvplugError
from kvplug.policies import POLICIES, check, make_stages
from kvplug.policies.base import Stages
from kvplug.policies.packages import GROUP
from kvplug.probe.last_activated import LastAndActivatedProbe
from tests.cases import PolicyCase
from tests.made_up import Piece, World

RECIPE = '''
from dataclasses import dataclass

from kvplug.index.minmax import MinMax
from kvplug.policies.base import Policy, Stages
from kvplug.probe.last_activated import LastAndActivatedProbe


@dataclass(frozen=True)
class Mine(Policy):
    """Bounds, probed by the last tokens."""

    tokens: int = 2

    def stages(self):
        return Stages(index=MinMax(), probe=LastAndActivatedProbe(last=self.tokens, active=0))


not_a_recipe = 3
'''
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(package, entry points, source)``: as pip leaves a package, for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(package: str, entries: dict[str, str], source: str = RECIPE) -> None:
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
        monkeypatch.delitem(sys.modules, package, raising=False)

    return make


def refusal(name: str) -> str:
    with pytest.raises(KvplugError) as caught:
        make_stages(name, {})
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_recipe_of_another_package(install: Install) -> None:
    """Checked at start-up, its options too, and it selects as its stages do."""
    install("made_up_a", {"mine": "made_up_a:Mine"})
    stages = make_stages("mine", {"tokens": 3, "budget": "entropy"})
    assert isinstance(stages, Stages)
    assert stages.probe == LastAndActivatedProbe(last=3, active=0)
    assert stages.budget.name == "entropy"
    with pytest.raises(KvplugError, match="Unknown option 'token' of policy 'mine'"):
        check({"policy": "mine", "options": {"token": 3}})
    small = {"sink": 10, "local": 20, "budget": 46, "window": 16, "dense_below": 100}
    probe = {"name": "last_activated", "last": 2, "active": 0}
    pieces = [Piece(1, 256, 64, True), Piece(2, 480, 1, False)]
    theirs = World(PolicyCase("mine", {}), small).run(pieces)
    assert theirs == World(PolicyCase("quest", {"probe": probe}), small).run(pieces)
    assert "mine" not in POLICIES, "what is installed must not stay behind in kvplug's own list"


def test_a_recipe_is_found_in_a_new_process(install: Install, tmp_path: Path) -> None:
    """As vLLM's workers are; and nothing of the package is imported for another recipe."""
    install("made_up_b", {"mine": "made_up_b:Mine"})
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from kvplug.policies import make_stages\n"
        "make_stages('quest', {}); print('made_up_b' in sys.modules)\n"
        "print(make_stages('mine', {}).index.name)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert told == ["False", "minmax"]


def test_a_name_of_kvplugs_own_is_refused(install: Install) -> None:
    """Neither recipe may stand in for the other: which one was meant cannot be known."""
    install("made_up_c", {"quest": "made_up_c:Mine", "mine": "made_up_c:Mine"})
    message = refusal("quest")
    assert message.startswith("Policy 'quest' is kvplug's own, but package 'made_up_c' ")
    assert "made_up_c:Mine" in message
    assert make_stages("mine", {}).index is not None
    assert make_stages("simhash", {}).index is not None


def test_a_name_that_two_packages_claim_is_refused(install: Install) -> None:
    install("made_up_d", {"mine": "made_up_d:Mine"})
    install("made_up_e", {"mine": "made_up_e:Mine"})
    message = refusal("mine")
    assert "package 'made_up_d'" in message
    assert "package 'made_up_e'" in message


@pytest.mark.parametrize(
    ("value", "source", "told"),
    [
        ("made_up_f:not_a_recipe", RECIPE, "is no subclass of kvplug.policies.base.Policy."),
        ("made_up_f:dataclass", RECIPE, "is no subclass of kvplug.policies.base.Policy."),
        ("made_up_f:Missing", RECIPE, "cannot be imported: AttributeError: "),
        ("nowhere_at_all:Mine", RECIPE, "cannot be imported: ModuleNotFoundError: "),
        ("made_up_f:Mine", "raise OSError('broken')", "cannot be imported: OSError: broken."),
    ],
)
def test_a_broken_package_is_told(install: Install, value: str, source: str, told: str) -> None:
    install("made_up_f", {"mine": value}, source)
    message = refusal("mine")
    assert message.startswith("Policy 'mine' of package 'made_up_f' (")
    assert told in message
    assert make_stages("quest", {}).index is not None, "other recipes are not touched"


def test_an_unknown_name_lists_other_packages_too(install: Install) -> None:
    install("made_up_g", {"my_recipe": "made_up_g:Mine"})
    message = refusal("my_recpe")
    assert message.startswith("Unknown policy 'my_recpe': did you mean 'my_recipe'?")
    assert "quest" in message
