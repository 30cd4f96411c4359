"""Run launches: on CuPy's current stream, or, in the tests, on the host build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import _load
from ._launch import Launch

Executor = Callable[[tuple[Launch, ...]], None]
_executor: Executor = _load.run
_capability: tuple[int, int] | None = None  # of the GPU that an executor stands for; None: of the array's


def run(*launches: Launch) -> None:
    """Execute the launches in order: on the current stream of the arrays' device."""
    _executor(launches)


def capability(array: Any) -> tuple[int, int]:
    """Compute capability, (9, 0) for instance, of the GPU that holds an array."""
    return _capability or _load.capability(array.data.device_id)


@contextmanager
def executor(replacement: Executor, capability: tuple[int, int] = _load.OLDEST) -> Iterator[None]:
    """Within the block `run` calls `replacement`, as if on a GPU of this capability. For tests; not thread-safe."""
    global _executor, _capability
    before = _executor, _capability
    _executor, _capability = replacement, capability
    try:
        yield
    finally:
        _executor, _capability = before
