"""Error feedback, row by row: the inner loop of the calibrated encoder.

Within a run of columns, coefficient i of a row is put on its grid and what that leaves is spread over the
columns after it, c[j] -= e U[i, j] with e = (c[i] - v[i]) / U[i, i]. Rows do not depend on each other.
"""

from __future__ import annotations

import numba
import numpy as np

from ._jit import cpu_kernel

_ZERO, _HALF = np.float32(0), np.float32(0.5)


@cpu_kernel(parallel=True)
def quantize_run(c, start, stop, upper, step, row_scale, dead, shrink, top, codes, error):
    """Codes of the columns start .. stop of every row.

    c : (rows, cols) float32, changed in those columns
    upper : (cols, cols) float32, U
    step : (cols,) float32; row_scale : (rows,) float32: the grid is step * row_scale
    dead : rounding thresholds lie at (m + 1/2 + dead) grid steps
    shrink : grid value m stands for m - shrink, m >= 1
    top : largest code
    codes : (rows, cols) int8, written; error : (rows, >= stop - start) float32, written: e of each column
    """
    for r in numba.prange(c.shape[0]):
        for i in range(start, stop):
            grid = step[i] * row_scale[r]
            value = c[r, i]
            m = np.floor(abs(value) / grid + _HALF - dead) if grid > _ZERO else _ZERO
            m = min(max(m, _ZERO), top)
            kept = max(m - shrink, _ZERO) * grid
            e = (value - (kept if value >= _ZERO else -kept)) / upper[i, i]
            codes[r, i] = np.int8(m if value >= _ZERO else -m)
            error[r, i - start] = e
            for j in range(i + 1, stop):
                c[r, j] -= e * upper[i, j]


@cpu_kernel(parallel=True)
def count_codes(columns, counts):
    """counts[k, v + 128] = how often the value v stands in columns[k].

    columns : (cols, rows) int8; counts : (cols, 256) int64, written
    """
    for k in numba.prange(columns.shape[0]):
        for v in range(256):
            counts[k, v] = 0
        for r in range(columns.shape[1]):
            counts[k, np.int64(columns[k, r]) + 128] += 1
