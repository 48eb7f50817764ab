"""How much of a context a request attends to, from the same planning code that serves it."""

from __future__ import annotations

import numpy as np

from kvplug.config import KvplugConfig
from kvplug.pipeline import region_sizes
from kvplug.policies import make_stages
from kvplug.windows import cut_windows


def attended_share(config: KvplugConfig, page: int, prompt: int, decoded: int) -> float:
    """Pages attended / pages available, over all queries of a request, per layer.

    Args:
        config: The engine's options.
        page: Tokens per page.
        prompt: Tokens of the prompt.
        decoded: Tokens decoded after it.
    """
    if make_stages(config.policy, config.options).always_dense:
        return 1.0
    geometry = region_sizes(config, page)
    attended = available = 0.0
    for first, stop, prefilling in ((0, prompt, True), (prompt, prompt + decoded, False)):
        if stop == first:
            continue
        bounds, ends = np.array([0, stop - first], np.int32), np.array([stop], np.int32)
        windows = cut_windows(bounds, ends, np.array([prefilling]), geometry)
        # A window's queries see its context up to themselves: on average, half of the window less.
        seen = (windows.context_end - windows.num_tokens / 2) / page
        skipped = (windows.far_end - windows.far_begin - windows.num_selected) * windows.sparse
        available += (seen * windows.num_tokens).sum()
        attended += ((seen - skipped) * windows.num_tokens).sum()
    return float(attended / available) if available else 1.0
