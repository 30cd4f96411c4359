"""Environment variables that commands depend on, checked before a command does any work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from ._errors import Failure, one_line

_MAX_THREADS = 4096  # Numba starts all of them, and a system that has no room for them ends the process


def _rbe_num_threads(_: str) -> None:
    from ..threads import from_environment

    from_environment()


def _numba_num_threads(value: str) -> None:
    text = value.strip()
    if not (text.isdecimal() and len(text) < 10 and 1 <= int(text) <= _MAX_THREADS):
        raise ValueError(f"it needs a number from 1 to {_MAX_THREADS}, or unset it")


def _numba_disable_jit(value: str) -> None:
    if value.strip() not in ("", "0"):
        raise ValueError("kernels have to be compiled; unset it")


def _rbe_isa(value: str) -> None:
    if value:
        from ..cpu_fallback import isa  # noqa: F401  reads the variable


def _rbe_gpu_costs(value: str) -> None:
    if value:
        from ..cpu_fallback.matmul_costs import read_costs_file

        try:
            read_costs_file(Path(value))
        except ValueError as error:
            warnings.warn(f"{error}; the built-in costs are used", RuntimeWarning, stacklevel=2)


def _rbe_gpu_attention(_: str) -> None:
    from ..gpu.attention_wgmma import from_environment

    from_environment()


def _numba_threading_layer(value: str) -> None:
    known = ("default", "safe", "forksafe", "threadsafe", "tbb", "omp", "workqueue")
    if value not in known:
        raise ValueError(f"it needs one of {', '.join(known)}, or unset it")


_CHECKS: dict[str, Callable[[str], None]] = {
    "RBE_NUM_THREADS": _rbe_num_threads,
    "NUMBA_NUM_THREADS": _numba_num_threads,
    "NUMBA_THREADING_LAYER": _numba_threading_layer,
    "NUMBA_DISABLE_JIT": _numba_disable_jit,
    "RBE_ISA": _rbe_isa,
    "RBE_GPU_COSTS": _rbe_gpu_costs,
    "RBE_GPU_ATTENTION": _rbe_gpu_attention,
}


def check() -> None:
    """Refuse variables that cannot be honoured, with exit code 2."""
    for name, check_value in _CHECKS.items():
        value = os.environ.get(name)
        if value is None:
            continue
        try:
            check_value(value)
        except (OSError, ValueError, RuntimeError) as error:
            message = one_line(error)
            raise Failure(message if name in message else f"{name}={value!r}: {message}", 2) from None
