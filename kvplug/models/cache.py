"""Builds a model folder once and keeps it under `$KVPLUG_CACHE` (default `~/.cache/kvplug`)."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """The folder of all bundled models."""
    return Path(os.environ.get("KVPLUG_CACHE") or Path.home() / ".cache" / "kvplug") / "models"


def recipe_version(*modules: str) -> str:
    """Eight hex digits over the files a model is made from, so a changed recipe is built anew.

    Args:
        modules: Names of files in this folder; the tokenizer's files always count.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for name in sorted({*modules, "tokenizer.py", "template.py", "words.py", "words.txt"}):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]


def cached_model(name: str, build: Callable[[Path], Path]) -> Path:
    """The folder `name` of the cache, built first where it is missing.

    The model is built in a folder of its own and renamed when complete: a folder of that name is
    always whole, also when several processes build at once (the first rename wins).

    Args:
        name: Folder name, with the version in it.
        build: Writes the model into the empty folder it is given.
    """
    final = cache_root() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
