"""layer_norm: y[r,c] = (s[r,c] - mean s[r]) / sqrt(var s[r] + eps) * weight[c] + bias[c], s = x + residual.

One pass takes the moments, a second writes. Moments of 1024 columns at a time: float32 sums of d = s - shift
and of d^2, shift being the mean of the chunk's first 16 values. For any data (shift - mean)^2 is at most
count/16 times the variance, so the sums lose at most 6 bits where a sum of s^2 could lose all 24. The chunks'
means and squares are combined in float64 (Chan, Golub and LeVeque 1979). The mean is subtracted in two
float32 parts: at a mean of 1e4 the last place of float32 is 1e-3, which may well be the spread.
A row whose squares leave float32, or whose spread the shift's own rounding hides, is computed again in float64
(`norm_rows`), so that every finite row has its right result.
Source: Ba, Kiros and Hinton 2016, "Layer normalization".
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
    vsub,
    vsum,
    widen,
)

_CHUNK = 1024
PARALLEL_FROM = 65536  # elements: 6/6 us with one/two threads at 32768, 11/10 us at 65536
_ZERO = np.float32(0.0)
# A sum of d^2 that is more than this many times that of (s - mean)^2 holds little but the shift's error: the bound is
# 1 + 1024 / 16, see above.
_MAX_SHIFT = 128.0
_SIXTEENTH = np.float32(1 / 16)
_ONES = np.ones(16, np.float32)


@cpu_inline
def _moments(x, residual, at, count):
    """Of `count` values from `at` on: shift, sum of s - shift, sum of (s - shift)^2."""
    first = min(count, 16)
    start = vsum(load_partial(x, residual, at, first))
    shift = start * _SIXTEENTH if first == 16 else start / np.float32(first)
    middle = vsplat(shift)
    sum0 = vsplat(_ZERO)
    sum1 = vsplat(_ZERO)
    square0 = vsplat(_ZERO)
    square1 = vsplat(_ZERO)
    pairs = count - count % 32
    for i in range(at, at + pairs, 32):
        d0 = vsub(load_16(x, residual, i), middle)
        d1 = vsub(load_16(x, residual, i + 16), middle)
        sum0 = vadd(sum0, d0)
        sum1 = vadd(sum1, d1)
        square0 = vfma(d0, d0, square0)
        square1 = vfma(d1, d1, square1)
    for i in range(pairs, count, 16):
        left = min(16, count - i)
        lanes = vload_n(_ONES, 0, left)  # 0 beyond the row's end, where s is not the shift
        d0 = vmul(vsub(load_partial(x, residual, at + i, left), middle), lanes)
        sum0 = vadd(sum0, d0)
        square0 = vfma(d0, d0, square0)
    return shift, vsum(vadd(sum0, sum1)), vsum(vadd(square0, square1))


@cpu_inline
def _statistics(x, residual, at, cols, eps, per_col):
    """The mean as float32, what that rounded off times 1 / deviation, and 1 / deviation, which is 0 if the row is for
    `_wide_row`. `per_col` is 1 / cols."""
    count = min(_CHUNK, cols)
    shift, first, second = _moments(x, residual, at, count)
    inside = np.float64(first) * (per_col if cols <= _CHUNK else 1.0 / _CHUNK)
    mean = shift + inside
    squares = second - first * inside  # sum of (s - mean)^2
    shifted = np.float64(second)
    for col in range(_CHUNK, cols, _CHUNK):
        count = min(_CHUNK, cols - col)
        shift, first, second = _moments(x, residual, at + col, count)
        inside = np.float64(first) / count
        between = shift + inside - mean
        squares += second - first * inside + between * between * col * (count / (col + count))
        shifted += second
        mean += between * (count / (col + count))
    if squares < 0.0:  # a constant row, after rounding
        squares = 0.0
    variance = squares * per_col + eps
    if not in_range(variance) or shifted * per_col > _MAX_SHIFT * variance:
        return _ZERO, _ZERO, _ZERO
    rstd = 1.0 / np.sqrt(variance)
    high = np.float32(mean)
    return high, np.float32((np.float64(high) - mean) * rstd), np.float32(rstd)


@cpu_inline(exact=True, inline=False)
def _wide_row(x, weight, bias, eps, residual, out, residual_out, at, cols):
    """The row that begins at `at`, in float64."""
    total, squares = 0.0, 0.0
    for i in range(at, at + cols):
        total += wide_value(x, residual, i)
    mean = total / cols  # of equal values it is that value: their sum is exact
    for i in range(at, at + cols):
        d = wide_value(x, residual, i) - mean
        squares += d * d
    rstd = 1.0 / np.sqrt(squares / cols + eps)
    for col in range(cols):
        s = wide_value(x, residual, at + col)
        y = (s - mean) * rstd * np.float64(widen(element(weight, col)))
        if bias is not None:
            y += np.float64(widen(element(bias, col)))
        if residual_out is not None:
            store_element(residual_out, at + col, np.float32(s))
        store_element(out, at + col, np.float32(y))


def _rows(x, weight, bias, eps, residual, out, residual_out, start, stop):
    cols = x.shape[1]
    if start >= stop:
        return
    per_col = 1.0 / cols  # a division takes as long as 100 columns
    high, low, rstd = _statistics(x, residual, start * cols, cols, eps, per_col)
    for row in range(start, stop):
        at = row * cols
        v_mean = vsplat(high)
        v_low = vsplat(low)
        v_rstd = vsplat(rstd)
        wide = rstd == _ZERO
        if row + 1 < stop:  # the next row's divisions and root are under way while this one is written
            high, low, rstd = _statistics(x, residual, at + cols, cols, eps, per_col)
        if wide:
            _wide_row(x, weight, bias, eps, residual, out, residual_out, at, cols)
            continue
        whole = cols - cols % 16
        for col in range(0, whole, 16):
            s = load_16(x, residual, at + col)
            z = vfma(vsub(s, v_mean), v_rstd, v_low)
            gain = vload(weight, col)
            y = vmul(z, gain) if bias is None else vfma(z, gain, vload(bias, col))
            if residual_out is not None:
                vstore(residual_out, at + col, s)
            vstore(out, at + col, y)
        if whole < cols:
            left = cols - whole
            s = load_partial(x, residual, at + whole, left)
            z = vfma(vsub(s, v_mean), v_rstd, v_low)
            gain = vload_n(weight, whole, left)
            y = vmul(z, gain) if bias is None else vfma(z, gain, vload_n(bias, whole, left))
            if residual_out is not None:
                vstore_n(residual_out, at + whole, s, left)
            vstore_n(out, at + whole, y, left)


_in_parts = in_parts(_rows)
#: For kernels with several steps: the arguments of `layer_norm`, and the rows start .. stop.
normalize_rows = cpu_inline(_rows)


def layer_norm(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
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
    weight, bias : (cols,), each of any of the three dtypes
    """
    arrays = (
        bits(x),
        bits(weight),
        None if bias is None else bits(bias),
        eps,
        None if residual is None else bits(residual),
        bits(out),
        None if residual_out is None else bits(residual_out),
    )
    parts = min(num_threads(), x.shape[0]) if x.size >= PARALLEL_FROM else 1
    _in_parts(x.shape[0], parts, *arrays)
