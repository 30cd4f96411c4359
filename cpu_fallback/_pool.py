"""Number of threads of a kernel: min(limit of this package, Numba's number for the calling Python thread).

The threads are those of `_workers`. None of Numba's threading layers takes every call: GNU OpenMP aborts a forked
process that calls it, workqueue aborts one whose threads call it at once, OpenMP makes a team of threads for each
Python thread that calls it, and all of them wait for threads that the system schedules late. Numba's layer is started
only for its number of threads.

A forked process has a limit of 1 until `set_limit` raises it there. Results do not depend on which thread computes a
part, so every number of threads gives the same bits.
"""

from __future__ import annotations

import os
import warnings

from rbe_gpu import forks, threads

from . import _numba_internals as internals
from . import _workers

#: As many threads as Numba has.
MAX_THREADS = internals.NUM_THREADS
_forked = forks.happened and internals.threads_started()
internals.start_threads()


set_limit = _workers.set_limit


def num_threads() -> int:
    """How many threads a kernel called now from this Python thread may use."""
    return min(_workers.limit(), internals.num_threads())


def _after_fork() -> None:
    """In a forked child: only this thread exists, and locks may be held by threads that do not."""
    _workers.after_fork()
    internals.renew_locks()


def _first_limit() -> int:
    """What the environment asks for, or all that Numba has; 1 in a forked process."""
    if _forked:
        return 1
    if threads.asked is not None and threads.asked > MAX_THREADS:
        warnings.warn(
            f"{threads.VARIABLE}={threads.asked}, but Numba has {MAX_THREADS} threads; kernels use {MAX_THREADS}. "
            f"To have more, set NUMBA_NUM_THREADS={threads.asked} before Numba is imported.",
            RuntimeWarning,
            stacklevel=2,
        )
    return min(threads.asked or MAX_THREADS, MAX_THREADS)


set_limit(_first_limit())
if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=_after_fork)
