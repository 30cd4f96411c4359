"""Run launches: on CuPy's current stream, or, in the tests, on the host build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import _load
from ._launch import Launch

Executor = Callable[[tuple[Launch, ...]], None]
_executor: Executor = _load.run


def run(*launches: Launch) -> None:
    """Execute the launches in order: on the current stream of the arrays' device."""
    _executor(launches)


@contextmanager
def executor(replacement: Executor) -> Iterator[None]:
    """Within the block `run` calls `replacement`. For tests; not thread-safe."""
    global _executor
    before, _executor = _executor, replacement
    try:
        yield
    finally:
        _executor = before
