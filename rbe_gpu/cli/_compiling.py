"""A line on a terminal while kernels of the CPU are compiled, which takes half a minute where none are cached."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ._streams import say

_AFTER = 1.0  # seconds


@contextmanager
def announced() -> Iterator[None]:
    """Say once that kernels are compiled, if that takes more than a second and standard error is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rbe_gpu.cpu_fallback._numba_internals import during_compilation

    start: list[float] = []

    def call() -> None:
        now = time.perf_counter()
        if not start:
            start.append(now)
        elif len(start) == 1 and now - start[0] > _AFTER:
            start.append(now)
            say("rbe-gpu: compiling kernels for this processor, once; later runs take them from the cache")

    with during_compilation(call):
        yield
