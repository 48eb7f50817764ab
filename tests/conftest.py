"""Shared by all tests: the environment vLLM reads when it is imported, a seed, and the GPU skip."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

# vLLM reads these when it is first imported, so they stand here, ahead of every test module.
# A value set outside wins.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are bundled
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; the default takes half of the machine's memory
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # use every core, also where there are two
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the test's process
    "VLLM_NO_USAGE_STATS": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

SEED = 0


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and torch before each test; the seed is there for generators."""
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that none is left for one process at the end; skips without a GPU."""
    items.sort(
        key=lambda item: (not item.get_closest_marker("engine"), "kernels" not in item.path.parts)
    )
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
