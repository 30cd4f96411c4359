"""Invalid arguments that several ops refuse, and functions that make a valid argument invalid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._case import ErrorCase


def to_float64(a: NDArray[Any]) -> NDArray[Any]:
    return a.astype(np.float64)


def as_float16(a: NDArray[Any]) -> NDArray[Any]:
    return np.empty(a.shape, np.float16)


def to_int32(a: NDArray[Any]) -> NDArray[Any]:
    return a.astype(np.int32)


def shorter(a: NDArray[Any]) -> Any:
    """Without its last entry along the first axis."""
    return a[:-1].copy()


def narrower(a: NDArray[Any]) -> NDArray[Any]:
    """Without its last entry along the last axis."""
    return np.ascontiguousarray(a[..., :-1])


def strided(a: NDArray[Any]) -> Any:
    """The same values with gaps between them in memory."""
    return np.repeat(a, 2, axis=-1)[..., ::2]


def scalar(a: NDArray[Any]) -> NDArray[Any]:
    return a.reshape(-1)[:1].reshape(())


def as_list(a: NDArray[Any]) -> Any:
    return a.tolist()


def read_only(a: NDArray[Any]) -> NDArray[Any]:
    a.flags.writeable = False
    return a


NO_SYNC = "checking values would need a host synchronisation"

X_ERRORS = (
    ErrorCase("x float64", {"x": to_float64}, TypeError, "float64"),
    ErrorCase("x int32", {"x": to_int32}, TypeError, "int32"),
    ErrorCase("x a list", {"x": as_list}, TypeError, "numpy"),
    ErrorCase("x strided", {"x": strided}, ValueError, "contiguous"),
)
RANK_ERROR = ErrorCase("x 0-D", {"x": scalar}, ValueError, "axes")
OUT_ERRORS = (
    ErrorCase("out float16", {"out": as_float16}, TypeError, "float16"),
    ErrorCase("out a list", {"out": as_list}, TypeError, "numpy"),
    ErrorCase("out narrower", {"out": narrower}, ValueError, "out has shape"),
    ErrorCase("out strided", {"out": strided}, ValueError, "contiguous"),
    ErrorCase(
        "out read-only", {"out": read_only}, ValueError, "read-only", "CuPy arrays can always be written to"
    ),
)
RESIDUAL_ERRORS = (
    ErrorCase("residual shorter", {"residual": shorter}, ValueError, "residual has shape"),
    ErrorCase("residual float64", {"residual": to_float64}, TypeError, "residual has dtype"),
    ErrorCase("residual strided", {"residual": strided}, ValueError, "residual is not C-contiguous"),
)
BIAS_ERRORS = (
    ErrorCase("bias narrower", {"bias": narrower}, ValueError, "bias has shape"),
    ErrorCase("bias float64", {"bias": to_float64}, TypeError, "bias has dtype"),
    ErrorCase("bias strided", {"bias": strided}, ValueError, "bias is not C-contiguous"),
)
