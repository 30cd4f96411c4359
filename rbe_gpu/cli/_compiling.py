"""While kernels of the CPU are compiled, which takes some ten seconds where none are cached: a second process that
compiles some of them, and a line on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ._streams import say

_AFTER = 1.0  # seconds


def _compile_later(model: str, activations: str | None) -> subprocess.Popen[bytes] | None:
    """Start the second process: where there is a second core, for a model that need not be downloaded first."""
    if (os.cpu_count() or 1) < 2 or not os.path.exists(model):
        return None
    options = [] if activations is None else [activations]
    command = [sys.executable, "-m", "rbe_gpu.cli._compile_later", model, *options]
    nothing = subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    except OSError:  # no more processes, or no memory for one: this process compiles everything
        return None


@contextmanager
def compiling(model: str, activations: str | None) -> Iterator[None]:
    """A while in which kernels may be compiled to run a model.

    With the first of them a second process begins to compile what comes later; it ends with the while. If it takes
    more than a second and standard error is a terminal, a line says so, once.
    """
    from rbe_gpu.cpu_fallback._numba_internals import during_compilation

    start: list[float] = []
    others: list[subprocess.Popen[bytes] | None] = []

    def call() -> None:
        now = time.perf_counter()
        if not start:
            start.append(now)
            others.append(_compile_later(model, activations))
        elif len(start) == 1 and now - start[0] > _AFTER and sys.stderr.isatty():
            start.append(now)
            say("rbe-gpu: compiling kernels for this processor, once; later runs take them from the cache")

    try:
        with during_compilation(call):
            yield
    finally:
        for process in others:
            if process is not None:
                process.kill()
                process.wait()
