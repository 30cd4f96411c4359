"""Copies of an op's source with a line exchanged: what they give, where they give anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rbe_gpu.gpu import _execute, _source
from rbe_gpu.gpu._launch import Launch
from rbe_gpu.registry import relative_error

from . import build
from .executor import HostExecutor, KernelError, Library


def outcome(op: str, old: str, new: str, call: Callable[[], tuple[np.ndarray, np.ndarray]]) -> float:
    """The error of a call with `old`, which the op's source has once, exchanged for `new`.

    Infinite where the host build objects. `call` returns what it found and what was to be found.
    """
    source = _source.source(op)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the source of {op}"
    broken = Library(build.build(source.replace(old, new)))

    def execute(launches: tuple[Launch, ...]) -> None:
        for launch in launches:
            if launch.op == op:
                broken.launch(launch)
            else:
                HostExecutor()((launch,))

    try:
        with _execute.executor(execute):
            found, expected = call()
    except KernelError:
        return float("inf")
    return relative_error(found, expected)
