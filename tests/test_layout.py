"""The promises of CONTRIBUTING.md about the source tree that a program can check.

Everything is read from the files; only two tests import kvplug, each in a process of its own.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "loadtests", "patches", "serve")

# A part of kvplug may import parts of its own rank and below. A part is the first name under
# kvplug: a module or a folder. A new part gets a line here.
RANKS: tuple[tuple[str, ...], ...] = (
    ("kernels", "errors", "__init__"),
    (
        "compiled",
        "config",
        "console",
        "fields",
        "numeric",
        "options",
        "pages",
        "registry",
        "selection",
        "workspace",
    ),
    ("carry", "exact_mass", "page_reader", "page_table", "rotary", "row_counts", "step", "windows"),
    ("stage", "segment", "index", "probe", "budget", "select"),
    ("policies",),
    ("attended", "knobs", "layer_stages", "machine", "pending", "pipeline", "selection_counts"),
    ("offload", "observe"),
    ("attention",),
    ("binding", "episodes", "startup"),
    ("patches",),
    ("plugin",),
    ("models", "serve", "doctor"),
    ("bench", "demo", "evals", "loadtests"),
    ("cli", "__main__"),
)
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}

# (importing file, imported part) -> why it may look upwards.
UPWARD: dict[tuple[str, str], str] = {}

MAX_LINES = 400
MAX_MEDIAN = 110


def python_files(folder: str) -> list[Path]:
    """Every Python file below a folder of the repository, links followed."""
    return sorted(
        Path(where, name)
        for where, _, names in os.walk(ROOT / folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    )


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


KVPLUG = python_files("kvplug")
OTHERS = [path for folder in ("tests", "tools", "loadtests") for path in python_files(folder)]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every dotted name imported anywhere in a file, with its line; ``from a import b`` is a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parent = ".".join((*base, *(node.module or "").split(".")))
            for alias in node.names:
                yield f"{parent}.{alias.name}".replace("..", "."), node.lineno


def part_of(dotted: str) -> str | None:
    """The part of kvplug a dotted name belongs to; None for other packages."""
    first, _, rest = dotted.partition(".")
    if first != "kvplug":
        return None
    part = rest.partition(".")[0]
    known = (ROOT / "kvplug" / part).is_dir() or (ROOT / "kvplug" / f"{part}.py").is_file()
    return part if part and known else "__init__"


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders(name):
    link = ROOT / "kvplug" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "README.md").is_file()
    assert not (ROOT / name / "__init__.py").exists(), "it would shadow Hugging Face's `kernels`"


def test_linked_folders_are_imported_by_full_name():
    bare = [
        f"{relative(path)}:{line} imports {name}"
        for path in KVPLUG + OTHERS
        for name, line in imports(path)
        if name.partition(".")[0] in LINKED
    ]
    assert not bare, "write kvplug.<name> in full: " + "; ".join(bare)


def test_import_loads_nothing_heavy():
    code = "import sys, kvplug; print(*sorted({'vllm', 'torch', 'triton'} & set(sys.modules)))"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert not loaded, f"import kvplug loads {loaded}"


def test_every_part_has_a_rank():
    parts = {path.relative_to(ROOT / "kvplug").parts[0].removesuffix(".py") for path in KVPLUG}
    assert parts <= RANK.keys(), f"give {parts - RANK.keys()} a place in RANKS"


@pytest.mark.parametrize("path", KVPLUG, ids=relative)
def test_import_direction(path):
    here = path.relative_to(ROOT / "kvplug").parts[0].removesuffix(".py")
    wrong = []
    for name, line in imports(path):
        part = part_of(name)
        if part is None or (relative(path), part) in UPWARD:
            continue
        if RANK.get(part, 0) > RANK.get(here, len(RANKS)):
            wrong.append(f"line {line}: `{here}` may not import `{part}` ({name})")
    assert not wrong, f"{relative(path)}: " + "; ".join(wrong)


def test_upward_imports_are_still_there():
    """A line in UPWARD that no longer excuses anything goes."""
    stale = [
        f"{file} -> {part}"
        for file, part in UPWARD
        if part not in {part_of(name) for name, _ in imports(ROOT / file)}
    ]
    assert not stale


def test_files_are_short():
    lines = {relative(path): len(path.read_text().splitlines()) for path in KVPLUG + OTHERS}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"
    median = statistics.median(lines[relative(path)] for path in KVPLUG)
    assert median <= MAX_MEDIAN, f"half of kvplug's files are longer than {median} lines"


@pytest.mark.parametrize("path", KVPLUG, ids=relative)
def test_nothing_unpickles(path):
    """A pickle runs what it holds, so no file of ours may be one."""
    banned = {"pickle", "cloudpickle", "dill", "shelve", "joblib", "marshal"}
    wrong = [
        f"line {line}: {name}"
        for name, line in imports(path)
        if name.partition(".")[0] in banned or name in {"torch.load", "torch.save"}
    ]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and ast.unparse(node) == "allow_pickle=True":
            wrong.append(f"line {node.value.lineno}: allow_pickle=True")
    assert not wrong, f"{relative(path)}: " + "; ".join(wrong)


def text_files() -> list[Path]:
    """The files of the repository: git's list, or in an export of it, all but hidden folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = re.compile(r"/(\.(?!ci/|gitignore)|__pycache__/|build/|dist/)")
        names = [p for p in ROOT.rglob("*") if not hidden.search(f"/{relative(p)}")]
    return [path for path in names if path.is_file() and not path.is_symlink()]


# Spelt in pieces, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w./~$}-])/(?:home|root|Users|work|mnt)" + r"/[\w.-]+")
REGISTRY = re.compile(
    r"https?://[\w.-]*(?:pypi\.|pythonhosted\.|anaconda\.|download\.pytorch\.org|/simple)"
)


def test_text_names_no_machine_and_no_registry():
    """A path or package host of one machine breaks every other; pip's own settings choose hosts."""
    wrong = []
    for path in text_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        hits = MACHINE_PATH.findall(text)
        if relative(path) != "tools/setup_env.sh":
            hits += REGISTRY.findall(text)
        wrong += [f"{relative(path)}: {hit}" for hit in hits]
    assert not wrong, "; ".join(wrong)
