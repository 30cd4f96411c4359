"""threads of a kernel = min(what this package may use, what Numba may use in the calling thread).

The first number is `RBE_NUM_THREADS` when the package is loaded, or as many as Numba has, and `set_num_threads` sets
it for the whole process. The second is Numba's own setting (`NUMBA_NUM_THREADS`, `numba.set_num_threads`).

Products that NumPy's BLAS computes for this package keep to the same number (`with blas:`, by threadpoolctl); what
a program does with BLAS besides keeps its own.

A second Python thread that calls a kernel while one runs, and any thread of a forked process, works alone:
`rbe_gpu.cpu_fallback._pool` says how and why.
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


def _asked() -> int | None:
    """The number in the environment; None: none is set."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{VARIABLE}={text!r} is not a number of threads; set it to 1 or more, or unset it")
    return int(text)


#: What the environment asked for when the package was imported.
asked = _asked()
#: Whether this process was forked from one that had imported the package.
forked = False


@cache
def _pool() -> Any:
    """The pool of the CPU kernels: imports Numba, so not before a number is needed."""
    return import_module(".cpu_fallback._pool", __package__)


def set_num_threads(count: int) -> None:
    """Let kernels, and BLAS inside this package's products, use at most `count` threads, in the whole process.

    Parameters
    ----------
    count : 1 to as many as Numba has (`NUMBA_NUM_THREADS`, which is the number of cores if it is not set)

    Raises
    ------
    TypeError
        `count` is not an integer.
    ValueError
        `count` is outside that range.
    RuntimeError
        More than one, in a forked process: its kernels run on the caller's thread.
    """
    if isinstance(count, bool):
        raise TypeError("count is a bool; pass a number of threads")
    count = operator.index(count)
    pool = _pool()
    if not 1 <= count <= pool.MOST:
        raise ValueError(
            f"count={count} is outside 1 to {pool.MOST}, the threads that Numba has; "
            "to have more, set NUMBA_NUM_THREADS before Numba is imported"
        )
    if count > 1 and pool.alone():
        raise RuntimeError(
            f"count={count}: this process was forked, and kernels of a forked process run on one thread; "
            'start processes with multiprocessing\'s "spawn" or "forkserver" to have more'
        )
    pool.set_limit(count)


def get_num_threads() -> int:
    """How many threads a kernel that this thread calls may use; 1 in a forked process."""
    return int(_pool().num_threads())


class _Blas(ContextDecorator):
    """NumPy's BLAS on no more threads than kernels have, while any thread is inside.

    BLAS has one number for the process. The first thread that enters lowers it, where it is higher, and the last
    that leaves puts it back.
    """

    def __init__(self) -> None:
        self._libraries: list[Any] | None = None
        self._lowered: list[tuple[Any, int]] = []
        self.reset()

    def reset(self) -> None:
        """Nobody is inside."""
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        count = get_num_threads()
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            if self._libraries is None:
                self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
            self._lowered = [(lib, had) for lib in self._libraries if (had := lib.num_threads) > count]
            for library, _ in self._lowered:
                library.set_num_threads(count)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for library, had in self._lowered:
                    library.set_num_threads(had)


#: `with blas:` around products, or `@blas` on a function that takes them.
blas = _Blas()


def _after_fork() -> None:
    """In a child: the threads of the parent are gone, and so is whoever held a lock."""
    global forked
    forked = True
    blas.reset()


if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=_after_fork)
