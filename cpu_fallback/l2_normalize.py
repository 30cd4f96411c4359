"""l2_normalize: y[r,c] = x[r,c] / max(||x[r]||_2, eps).

Squares are summed pairwise (Higham 1993, "The accuracy of floating point summation"), in the order of `numpy.sum`, so
float32 rows have the bits of `x / numpy.maximum(numpy.linalg.norm(x, axis=1, keepdims=True), eps)`. A row whose
squares leave float32 is taken once more in float64 (`wide_rows`), so that every finite row has its right result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._jit import cpu_inline, cpu_kernel
from ._parts import in_parts
from ._pool import num_threads
from .simd import bits, element, vdiv, vload, vload_n, vsplat, vstore, vstore_n, widen
from .wide_rows import SMALLEST, in_range, wide_value

_PARALLEL_FROM = 65536  # elements: 27/35 us with one/two threads at 49152, 61/38 us at 98304
_PAIRWISE_FROM = 128  # terms; fewer are summed in eight lanes


@cpu_inline(exact=True)
def _square(x, at):
    value = widen(element(x, at))
    return value * value


@cpu_kernel(exact=True)  # every rounding as written
def _sum_of_squares(x, start, count):
    """Sum of x[i]^2 for start <= i < start + count, float32."""
    if count > _PAIRWISE_FROM:
        half = count // 2 // 8 * 8
        return _sum_of_squares(x, start, half) + _sum_of_squares(x, start + half, count - half)
    total = np.float32(0.0)
    whole = count // 8 * 8
    if whole:
        s0, s1, s2, s3 = (
            _square(x, start),
            _square(x, start + 1),
            _square(x, start + 2),
            _square(x, start + 3),
        )
        s4, s5, s6, s7 = (
            _square(x, start + 4),
            _square(x, start + 5),
            _square(x, start + 6),
            _square(x, start + 7),
        )
        for i in range(start + 8, start + whole, 8):
            s0, s1, s2, s3 = (
                s0 + _square(x, i), s1 + _square(x, i + 1), s2 + _square(x, i + 2), s3 + _square(x, i + 3)
            )  # fmt: skip
            s4, s5, s6, s7 = (
                s4 + _square(x, i + 4), s5 + _square(x, i + 5), s6 + _square(x, i + 6), s7 + _square(x, i + 7)
            )  # fmt: skip
        total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(start + whole, start + count):
        total += _square(x, i)
    return total


@cpu_kernel(exact=True)
def _wide_row(x, eps, out, start, cols):
    """The row that begins at `start`, in float64."""
    total = 0.0
    for i in range(start, start + cols):
        value = wide_value(x, None, i)
        total += value * value
    norm = np.sqrt(total)
    divisor = eps if norm < eps else norm  # NaN stays
    for i in range(start, start + cols):
        vstore_n(out, i, vsplat(np.float32(wide_value(x, None, i) / divisor)), 1)


@cpu_kernel(exact=True)
def _rows(x, cols, wide_eps, out, first, stop):
    """Rows first .. stop - 1 of the flat arrays."""
    eps = np.float32(wide_eps)
    # a mean square below SMALLEST is surely a norm below eps: a row of zeros need not be taken twice
    eps_rules = wide_eps * wide_eps > 2.0 * SMALLEST * cols
    per_col = 1.0 / cols
    for row in range(first, stop):
        start = row * cols
        squares = _sum_of_squares(x, start, cols)
        mean_square = np.float64(squares) * per_col
        if not in_range(mean_square) and not (mean_square < SMALLEST and eps_rules):
            _wide_row(x, wide_eps, out, start, cols)
            continue
        norm = np.sqrt(squares)
        divisor = vsplat(eps if norm < eps else norm)
        whole = cols - cols % 16
        for i in range(start, start + whole, 16):
            vstore(out, i, vdiv(vload(x, i), divisor))
        if whole < cols:
            left = cols - whole
            vstore_n(out, start + whole, vdiv(vload_n(x, start + whole, left), divisor), left)


_in_parts = in_parts(_rows)


def l2_normalize(x: NDArray[Any], eps: float, out: NDArray[Any]) -> None:
    """Write every row of `x`, divided by its L2 norm or by `eps` if that is larger, to `out`.

    Parameters
    ----------
    x, out : (rows, cols) float32/float16/bfloat16, one dtype, C-contiguous; `out` may be `x`
    """
    rows, cols = x.shape
    arguments = (bits(x).reshape(-1), cols, eps, bits(out).reshape(-1))
    parts = min(num_threads(), rows) if x.size >= _PARALLEL_FROM else 1
    if parts > 1:
        _in_parts(rows, parts, *arguments)
    else:
        _rows(*arguments, 0, rows)
