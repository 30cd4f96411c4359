"""rms_norm: y[r,c] = s[r,c] / sqrt(mean_c(s[r]^2) + eps) * weight[c], s = x + residual.

One pass sums s^2, in float32 within 1024 columns and in float64 between them; a second writes. A row whose squares
leave float32 is computed again in float64 (`norm_rows`), so that every finite row has its right result.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline
from ._parts import in_parts
from ._pool import num_threads
from .norm_rows import in_range, load_16, load_partial, wide_value
from .simd import (
    bits,
    element,
    store_element,
    vadd,
    vfma,
    vload,
    vload_n,
    vmul,
    vsplat,
    vstore,
    vstore_n,
    vsum,
    widen,
)

_CHUNK = 1024
_PARALLEL_FROM = 65536  # elements: 5/6 us with one/two threads at 32768, 8/9 us at 65536
_ZERO = np.float32(0.0)


@cpu_inline
def _squares(x, residual, at, count):
    """Sum of s^2 over `count` values from `at` on."""
    sum0 = vsplat(_ZERO)
    sum1 = vsplat(_ZERO)
    pairs = count - count % 32
    for i in range(at, at + pairs, 32):
        s0 = load_16(x, residual, i)
        s1 = load_16(x, residual, i + 16)
        sum0 = vfma(s0, s0, sum0)
        sum1 = vfma(s1, s1, sum1)
    for i in range(pairs, count, 16):
        s0 = load_partial(x, residual, at + i, min(16, count - i))
        sum0 = vfma(s0, s0, sum0)
    return vsum(vadd(sum0, sum1))


@cpu_inline
def deviation(x, residual, at, cols, eps, per_col):
    """1 / sqrt(mean(s^2) + eps) of the row that begins at `at`, 0 if it is for `_wide_row`. `per_col` is 1 / cols."""
    squares = 0.0
    for col in range(0, cols, _CHUNK):
        squares += _squares(x, residual, at + col, min(_CHUNK, cols - col))
    mean_square = squares * per_col + eps
    return np.float32(1.0 / np.sqrt(mean_square)) if in_range(mean_square) else _ZERO


@cpu_inline(exact=True, inline=False)
def _wide_row(x, weight, eps, residual, out, residual_out, at, cols):
    """The row that begins at `at`, in float64."""
    squares = 0.0
    for i in range(at, at + cols):
        s = wide_value(x, residual, i)
        squares += s * s
    rstd = 1.0 / np.sqrt(squares / cols + eps)
    for col in range(cols):
        s = wide_value(x, residual, at + col)
        y = s * rstd * np.float64(widen(element(weight, col)))
        if residual_out is not None:
            store_element(residual_out, at + col, np.float32(s))
        store_element(out, at + col, np.float32(y))


@cpu_inline
def write_row(x, weight, eps, residual, out, residual_out, at, cols, rstd):
    """The row that begins at `at`; rstd : as `deviation` gives it."""
    if rstd == _ZERO:
        _wide_row(x, weight, eps, residual, out, residual_out, at, cols)
        return
    factor = vsplat(rstd)
    whole = cols - cols % 16
    for col in range(0, whole, 16):
        s = load_16(x, residual, at + col)
        if residual_out is not None:
            vstore(residual_out, at + col, s)
        vstore(out, at + col, vmul(vmul(s, factor), vload(weight, col)))
    if whole < cols:
        left = cols - whole
        s = load_partial(x, residual, at + whole, left)
        if residual_out is not None:
            vstore_n(residual_out, at + whole, s, left)
        vstore_n(out, at + whole, vmul(vmul(s, factor), vload_n(weight, whole, left)), left)


def _rows(x, weight, eps, residual, out, residual_out, start, stop):
    cols = x.shape[1]
    if start >= stop:
        return
    per_col = 1.0 / cols  # a division takes as long as 100 columns
    rstd = deviation(x, residual, start * cols, cols, eps, per_col)
    for row in range(start, stop):
        at, own = row * cols, rstd
        if row + 1 < stop:  # the next row's division and root are under way while this one is written
            rstd = deviation(x, residual, at + cols, cols, eps, per_col)
        write_row(x, weight, eps, residual, out, residual_out, at, cols, own)


_in_parts = in_parts(_rows)


def rms_norm(
    x: NDArray[Any],
    weight: NDArray[Any],
    eps: float,
    residual: NDArray[Any] | None,
    out: NDArray[Any],
    residual_out: NDArray[Any] | None,
) -> None:
    """Write the normalised rows of s = x + residual to `out`, and s to `residual_out`.

    Parameters
    ----------
    x, residual, out, residual_out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous. `out` or
        `residual_out` may be `x` or `residual`: every element is read for the last time before it is written.
    weight : (cols,) of any of the three dtypes
    """
    arrays = (
        bits(x),
        bits(weight),
        eps,
        None if residual is None else bits(residual),
        bits(out),
        None if residual_out is None else bits(residual_out),
    )
    parts = min(num_threads(), x.shape[0]) if x.size >= _PARALLEL_FROM else 1
    _in_parts(x.shape[0], parts, *arrays)
