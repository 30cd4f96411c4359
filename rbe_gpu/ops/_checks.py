"""Argument checks of the ops, and their common decorator."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any, ParamSpec, TypeVar, cast

import ml_dtypes
import numpy as np

from ..blocks import Array
from ..dispatch import Backend, as_cupy, backend_of, device_memory_error, device_of, module_of
from ..workspace import Workspace

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOAT32 = FLOATS[0]  # comparing dtypes takes 0.1 us, comparing identities a quarter of it
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
FLOAT_NAMES = "float32, float16 or bfloat16"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def op(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let the arguments of an op be GPU arrays of any library.

    Every op calls `backend_of` first, which raises for arrays of libraries other than NumPy and CuPy; only then are
    the arguments converted.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            try:
                return function(*args, **kwargs)
            except TypeError:
                values: Any = [as_cupy(a) for a in args]
                named: Any = {name: as_cupy(a) for name, a in kwargs.items()}
                before, after = [*args, *kwargs.values()], [*values, *named.values()]
                if all(a is b for a, b in zip(before, after, strict=True)):
                    raise
            return function(*values, **named)
        except MemoryError as error:
            device_error = device_memory_error(error)
            raise device_error from (None if device_error is error else error)

    return call


# --- checks -------------------------------------------------------------------------------------------


def is_plain(a: Array) -> bool:
    """Whether an array is float32 and C-contiguous: a fast path past two checks, for most calls."""
    return a.dtype is FLOAT32 and bool(a.flags.c_contiguous)


def check_float(**arrays: Array | None) -> None:
    for name, a in arrays.items():
        if a is not None and a.dtype is not FLOAT32 and a.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {a.dtype}; use {FLOAT_NAMES} ({name}.astype(numpy.float32))")


def check_contiguous(**arrays: Array | None) -> None:
    for name, a in arrays.items():
        if a is not None and not a.flags.c_contiguous:
            module = module_of(a).__name__
            raise ValueError(f"{name} is not C-contiguous; pass {module}.ascontiguousarray({name})")


def check_shape(name: str, a: Array | None, shape: tuple[int, ...], why: str) -> None:
    if a is not None and a.shape != shape and tuple(a.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(a.shape)}, expected {tuple(shape)} ({why})")


def check_rank(name: str, a: Array, least: int) -> None:
    if a.ndim < least:
        raise ValueError(f"{name} has {a.ndim} axes, needs at least {least}")


def output(
    backend: Backend, out: Array | None, shape: tuple[int, ...], dtype: Any, name: str = "out"
) -> Array:
    """`out`, checked, or a new array."""
    if out is None:
        return cast(Array, backend.xp.empty(shape, dtype))
    if type(out) is np.ndarray and out.dtype is dtype and out.shape == shape and out.flags.carray:
        return out
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}, expected {np.dtype(dtype)}")
    check_shape(name, out, shape, "the shape of the result")
    check_contiguous(**{name: out})
    if not getattr(out.flags, "writeable", True):  # CuPy arrays always are
        raise ValueError(f"{name} is read-only; pass a writable array")
    return out


def scratch_of(workspace: Workspace | None, a: Array) -> Workspace:
    """Scratch memory on the device of `a`."""
    return (workspace or Workspace()).on(device_of(a))


def as_rows(a: Array | None, cols: int) -> Array | None:
    """`a` as (rows, cols), all axes but the last merged; a view, since it is contiguous."""
    if a is None or (a.ndim == 2 and a.shape[1] == cols):
        return a
    return a.reshape(-1 if cols else prod(a.shape[:-1]), cols)


def check_rows(x: Array) -> None:
    """x is an array of at least one axis."""
    if type(x) is not np.ndarray:
        backend_of(x=x)
    check_rank("x", x, 1)


def check_residual(x: Array, residual: Array) -> None:
    """residual has the shape and dtype of x, and is contiguous."""
    check_shape("residual", residual, x.shape, "the shape of x")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual has dtype {residual.dtype}, x has {x.dtype}; use one dtype")
    check_contiguous(residual=residual)


def check_vector(name: str, a: Array | None, cols: int, what: str = "the last axis of x") -> None:
    if a is None or (a.shape == (cols,) and is_plain(a)):
        return
    check_float(**{name: a})
    check_shape(name, a, (cols,), what)
    check_contiguous(**{name: a})


def int64_lengths(backend: Backend, lengths: Array, batch: int, axis: str, seq: int) -> Array:
    """Lengths of padded sequences, checked, as int64."""
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths has dtype {lengths.dtype}; use integers")
    check_shape("lengths", lengths, (batch,), "one per sequence")
    if backend.checks_values and lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > seq):
        raise ValueError(f"lengths must be between 0 and {axis}={seq}")
    return cast(Array, backend.xp.ascontiguousarray(lengths, np.int64))


def int64_cu_seqlens(backend: Backend, name: str, ends: Array, rows: str, total: int) -> Array:
    """Cumulative lengths of packed sequences, checked, as int64."""
    if ends.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} has dtype {ends.dtype}; use int32 or int64")
    if ends.ndim != 1 or ends.size < 1:
        raise ValueError(f"{name} has shape {tuple(ends.shape)}, expected (batch + 1,)")
    if backend.checks_values and not (ends[0] == 0 and ends[-1] == total and (ends[1:] >= ends[:-1]).all()):
        raise ValueError(f"{name} must start at 0, never fall and end at {total}, the rows of {rows}")
    return cast(Array, backend.xp.ascontiguousarray(ends, np.int64))
