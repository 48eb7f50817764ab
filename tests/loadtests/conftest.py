"""A fake server that is there for a test, and the words that documents are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvplug.models.tokenizer import build_tokenizer
from kvplug.serve import server
from kvplug.serve.server import running_server

FAKE = ["-m", "kvplug.loadtests.fake_server"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[..., server.Server]]:
    """``fake("--ttft-s", "0.1")``: a running fake server."""
    with ExitStack() as stack:

        def start(*flags: str) -> server.Server:
            return stack.enter_context(running_server([*FAKE, *flags], {}, tmp_path / "fake.log"))

        yield start
