"""Seconds of work on a GPU, with nothing of it left in its cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP = 5
COPIED = 2**30
"""Bytes of the copy that bandwidths are compared with."""
MIB = 2**20


class GpuTimer:
    """Medians of several runs, timed by events on the device.

    Before every run, memory twice as large as the L2 cache is overwritten. Runs are queued behind
    that, so the host's time to launch kernels is hidden as far as it is shorter.

    Args:
        device: A GPU.
        repeats: Runs that a median is of.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        """Allocates what is overwritten."""
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.repeats = repeats
        self.flushed = torch.empty(max(2 * cache, 64 * MIB), dtype=torch.uint8, device=device)
        self.device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of one run of ``work``.

        Args:
            work: Queues work on the current stream.
        """
        for _ in range(WARM_UP):
            work()
        events = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)
        ]
        for begin, end in events:
            self.flushed.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes per second of a large copy, bytes read and bytes written counted."""
        source = torch.empty(COPIED, dtype=torch.uint8, device=self.device).zero_()
        target = torch.empty_like(source)
        return 2 * COPIED / self.seconds(lambda: target.copy_(source))


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """What replays ``work`` as a CUDA graph.

    Args:
        work: Queues work on the current stream, and neither allocates what it keeps nor waits.

    Raises:
        RuntimeError: It cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> None:
        graph.replay()

    return replay
