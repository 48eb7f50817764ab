"""kvplug: page retrieval over vLLM's paged KV cache, for long contexts.

Importing this package imports neither vLLM, torch nor Triton. vLLM finds the plugin through the
entry point ``vllm.general_plugins`` (:mod:`kvplug.plugin`); people find it through the command
``kvplug`` (:mod:`kvplug.cli`).
"""

from __future__ import annotations

__version__ = "0.1.0"
