"""Install a built wheel into a clean venv and import every module of it there.

Usage: python tools/check_wheel.py dist/kvplug-0.1.0-py3-none-any.whl

A wheel can lose the linked folders (``kvplug/kernels``, ``loadtests``, ``patches``, ``serve``) in
silence. So this compares the wheel with the source tree file by file, then imports all its modules
in a venv that borrows this venv's dependencies but not its editable kvplug.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "loadtests", "patches", "serve")
APART = "kvplug.loadtests."
"""Modules that get a process of their own: locust replaces its sockets by gevent's."""

# Module -> why a machine without it cannot import it. Empty: every module must import anywhere.
NOT_HERE: dict[str, str] = {}

IMPORT_ALL = """
import importlib, importlib.metadata, sys, traceback
import kvplug
assert kvplug.__file__.startswith(sys.prefix), f"kvplug came from {kvplug.__file__}"
failed = 0
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        where = module.__file__ or next(iter(module.__path__))
        assert where.startswith(sys.prefix), f"{name} came from {where}"
    except BaseException:
        failed += 1
        print(f"FAILED to import {name}", file=sys.stderr)
        traceback.print_exc()
bare = {"kernels", "loadtests", "patches", "serve"} & set(sys.modules)
assert not bare, f"imported under a bare name: {bare}"
for point in importlib.metadata.distribution("kvplug").entry_points:
    point.load()
    print(f"entry point {point.group}: {point.name} = {point.value}")
sys.exit(failed > 0)
"""


def source_files() -> set[str]:
    """Paths under ``kvplug/``, links followed: all of them belong into the wheel, data too."""
    found = set()
    for folder, names, files in os.walk(ROOT / "kvplug", followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        visible = (name for name in files if not name.startswith("."))
        found |= {Path(folder, name).relative_to(ROOT).as_posix() for name in visible}
    return found


def module_name(path: str) -> str:
    """``kvplug/index/__init__.py`` -> ``kvplug.index``."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def check_contents(wheel: Path) -> list[str]:
    """The wheel's modules, once its files are known to be those of the source tree."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("kvplug/")}
    missing = sorted(source_files() - packed)
    if missing:
        sys.exit(f"the wheel lacks {missing}: is a suffix missing in pyproject's package-data?")
    for folder in LINKED:
        if not any(name.startswith(f"kvplug/{folder}/") for name in packed):
            sys.exit(f"the wheel has nothing of kvplug/{folder}: is the link there?")
    return sorted(module_name(name) for name in packed if name.endswith(".py"))


def clean_venv(folder: Path, wheel: Path) -> Path:
    """A venv with the wheel, and this venv's packages behind it; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    # A folder named in a .pth file has its own .pth files ignored, so the editable kvplug of this
    # venv stays out, and it comes after the wheel's folder on sys.path.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


def main() -> int:
    """Check the wheel named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/check_wheel.py WHEEL")
    wheel = Path(sys.argv[1]).resolve()
    modules = check_contents(wheel)
    wanted = [name for name in modules if name not in NOT_HERE]
    for name in sorted(NOT_HERE.keys() & set(modules)):
        print(f"skipped {name}: {NOT_HERE[name]}")
    with tempfile.TemporaryDirectory() as folder:
        python = clean_venv(Path(folder).resolve() / "venv", wheel)
        # -I: neither the working directory nor PYTHONPATH may lend a module.
        apart = [name for name in wanted if name.startswith(APART)]
        for names in ([name for name in wanted if name not in apart], apart):
            command = [str(python), "-I", "-c", IMPORT_ALL, *names]
            if subprocess.run(command, cwd=folder, check=False).returncode:
                return 1
    print(f"{wheel.name}: all {len(wanted)} modules import from a clean venv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
