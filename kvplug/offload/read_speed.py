"""How fast a folder's disk gives pages back, by reads like the hot pool's; bounded and tidy."""

from __future__ import annotations

import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kvplug.offload.cold_store import nameless_file

MOST_BYTES = 64 * 2**20
WRITE_S, ALONE_S, TOGETHER_S = 0.8, 0.5, 0.5
"""Seconds for writing, for reads one after the other and for reads of all threads."""
CHUNK = 4 * 2**20


class ReadSpeed(NamedTuple):
    """What was measured."""

    block: int
    """Bytes of a read."""
    latency_s: float
    """Median seconds of one read after the other."""
    bytes_per_s: float
    """Of all threads together."""
    file_bytes: int
    """Size of the file that was read."""


def measure_reads(folder: Path, block: int, threads: int) -> ReadSpeed:
    """Writes a file without a name, drops it from the system's page cache and reads it in blocks.

    It takes at most 64 MiB and about two seconds. Where the system keeps the file in memory all the
    same, its speed is memory's.

    Args:
        folder: Where the file is made.
        block: Bytes of a read.
        threads: That read together.

    Raises:
        OSError: The folder cannot be written to, or has no room.
    """
    fd = nameless_file(folder / f"{os.getpid()}.kvspeed")
    try:
        blocks = max(_write(fd, MOST_BYTES, WRITE_S) // block, 1)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        order = random.Random(0).sample(range(blocks), blocks)
        half = max(blocks // 4, 1)
        alone = _read(fd, block, order[:half], ALONE_S)
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            shares = [order[half:][n::threads] or order[:1] for n in range(threads)]
            done = list(pool.map(lambda share: _read(fd, block, share, TOGETHER_S), shares))
        seconds = time.perf_counter() - start
    finally:
        os.close(fd)
    count = sum(map(len, done))
    return ReadSpeed(block, statistics.median(alone), count * block / seconds, blocks * block)


def _write(fd: int, most: int, seconds: float) -> int:
    """Writes up to ``most`` bytes to the disk itself; how many it did in time."""
    start, done, data = time.perf_counter(), 0, os.urandom(CHUNK)
    while done < most and (not done or time.perf_counter() - start < seconds):
        done += os.pwrite(fd, data, done)
        os.fdatasync(fd)
    return done


def _read(fd: int, block: int, order: list[int], seconds: float) -> list[float]:
    """Seconds of each read, of as many as there is time for."""
    begin, taken, buffer = time.perf_counter(), list[float](), bytearray(block)
    for number in order:
        start = time.perf_counter()
        if taken and start - begin > seconds:
            break
        if os.preadv(fd, [buffer], number * block) != block:
            raise OSError("a read gave fewer bytes than were written")
        taken.append(time.perf_counter() - start)
    return taken
