"""Numba functions in two builds, one thread and all threads; the amount of work decides.

Waking a second thread takes about 15 microseconds, more than the whole of many decode-time calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, ClassVar

from numba import njit

ONE_THREAD_BELOW = 1 << 16
"""Elementary operations (one vector instruction, or one step of a scalar loop) worth a thread."""


class Compiled:
    """A function with :func:`numba.prange` loops, compiled both ways on first use.

    Args:
        function: What to compile.
        options: Of :func:`numba.njit`.
    """

    _warming_up: ClassVar[bool] = False

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        """Makes the two builds; nothing is compiled yet."""
        self.__doc__ = function.__doc__
        assert isinstance(function, FunctionType)
        # Python's model asks before every division whether to raise: no loop then runs on vectors.
        options = {"error_model": "numpy", **options}
        # numba's disk cache tells functions apart by name, not by options.
        alone = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_alone")
        alone.__qualname__ = f"{function.__qualname__}_alone"
        alone.__module__ = function.__module__
        self._all_threads = njit(parallel=True, cache=True, **options)(function)
        self._one_thread = njit(cache=True, **options)(alone)

    def __call__(self, work: int, *arguments: Any) -> None:
        """Calls the build that suits ``work`` elementary operations; both give the same bits."""
        if Compiled._warming_up:
            self._one_thread(*arguments)
            self._all_threads(*arguments)
        elif work < ONE_THREAD_BELOW:
            self._one_thread(*arguments)
        else:
            self._all_threads(*arguments)


@contextmanager
def warming_up() -> Iterator[None]:
    """While it lasts, every call goes through both builds, so that both are compiled."""
    Compiled._warming_up = True
    try:
        yield
    finally:
        Compiled._warming_up = False


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorator that makes a :class:`Compiled`."""
    return lambda function: Compiled(function, **options)


@contextmanager
def same_threads() -> Iterator[None]:
    """Makes numba use the threads that torch and vLLM's kernels use, no more and no fewer.

    All three share one OpenMP runtime. Numba sets its size when it starts its threads, and vLLM's
    kernel aborts if the size changes between planning and running.
    """
    import numba
    import torch

    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    yield
    # The worker has replaced torch.set_num_threads by a warning.
    torch._C.set_num_threads(threads)
