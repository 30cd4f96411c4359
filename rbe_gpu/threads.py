"""Number of threads of a kernel = min(limit of this package, limit of Numba in the calling thread).

The package's limit applies to the whole process: initially `RBE_NUM_THREADS`, or all threads of Numba if that is not
set, and later what `set_num_threads` sets. Numba's limit is `NUMBA_NUM_THREADS` or `numba.set_num_threads`.

Matmuls that this package computes with NumPy's BLAS use the same number of threads (`with blas:`, through
threadpoolctl). Other uses of BLAS in the program are not affected.

Kernels called from several Python threads at once share the threads. In a forked process the limit is 1 at first: its
siblings usually need the other cores. See `rbe_gpu.cpu_fallback._workers`.
"""

from __future__ import annotations

import operator
import os
import threading
from contextlib import ContextDecorator
from functools import cache
from importlib import import_module
from typing import Any

from threadpoolctl import ThreadpoolController

VARIABLE = "RBE_NUM_THREADS"


def from_environment() -> int | None:
    """The value of `RBE_NUM_THREADS`, or None if it is not set."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{VARIABLE}={text!r} is not a number of threads; set it to 1 or more, or unset it")
    return int(text)


#: `RBE_NUM_THREADS` when this module was imported, or None.
asked = from_environment()


@cache
def _pool() -> Any:
    """The thread pool of the CPU kernels. Imported on first use, because it imports Numba."""
    return import_module(".cpu_fallback._pool", __package__)


def set_num_threads(count: int) -> None:
    """Limit the threads of kernels, and of BLAS in this package's matmuls, in the whole process.

    Parameters
    ----------
    count : 1 to the number of Numba's threads (`NUMBA_NUM_THREADS`; default: the number of cores)

    Raises
    ------
    TypeError
        `count` is not an integer.
    ValueError
        `count` is outside that range.
    """
    if isinstance(count, bool):
        raise TypeError("count is a bool; pass a number of threads")
    count = operator.index(count)
    pool = _pool()
    if not 1 <= count <= pool.MAX_THREADS:
        raise ValueError(
            f"count={count} is outside 1 to {pool.MAX_THREADS}, the threads that Numba has; "
            "to have more, set NUMBA_NUM_THREADS before Numba is imported"
        )
    pool.set_limit(count)


def get_num_threads() -> int:
    """Number of threads that a kernel called from this thread may use."""
    return int(_pool().num_threads())


class _Blas(ContextDecorator):
    """Limit NumPy's BLAS to the number of threads of the kernels.

    BLAS has one setting for the process: the first thread that enters lowers it if it is higher, and the last one to
    leave restores it.
    """

    def __init__(self) -> None:
        self._libraries: list[Any] | None = None
        self._lowered: list[tuple[Any, int]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all threads that have entered."""
        self._lock = threading.Lock()
        self._entered = 0

    def __enter__(self) -> None:
        count = get_num_threads()
        with self._lock:
            self._entered += 1
            if self._entered > 1:
                return
            if self._libraries is None:
                self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
            self._lowered = [
                (lib, previous) for lib in self._libraries if (previous := lib.num_threads) > count
            ]
            for library, _ in self._lowered:
                library.set_num_threads(count)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                for library, previous in self._lowered:
                    library.set_num_threads(previous)


#: Use as `with blas:` or as the decorator `@blas`.
blas = _Blas()


def _after_fork() -> None:
    """In the child process: the parent's other threads do not exist, so their locks would never be released."""
    blas.reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
