"""Error feedback, row by row: the inner loop of the calibrated encoder.

Within a run of columns, coefficient i of a row is put on its grid and what that leaves is spread over the
columns after it, c[j] -= e U[i, j] with e = (c[i] - v[i]) / U[i, i]. Rows do not depend on each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._parts import in_parts
from ._pool import num_threads

_ZERO, _HALF = np.float32(0), np.float32(0.5)


def _quantize_run(c, start, stop, upper, step, row_scale, dead, shrink, top, codes, error, begin, end):
    for r in range(begin, end):
        for i in range(start, stop):
            grid = step[i] * row_scale[r]
            value = c[r, i]
            m = np.floor(abs(value) / grid + _HALF - dead) if grid > _ZERO else _ZERO
            m = min(max(m, _ZERO), top)
            kept = max(m - shrink, _ZERO) * grid
            e = (value - (kept if value >= _ZERO else -kept)) / upper[i - start, i - start]
            codes[r, i] = np.int8(m if value >= _ZERO else -m)
            error[r, i - start] = e
            for j in range(i + 1, stop):
                c[r, j] -= e * upper[i - start, j - start]


_quantize_run_in_parts = in_parts(_quantize_run)


def quantize_run(
    c: Any,
    start: Any,
    stop: Any,
    upper: Any,
    step: Any,
    row_scale: Any,
    dead: Any,
    shrink: Any,
    top: Any,
    codes: Any,
    error: Any,
) -> None:
    """Codes of the columns start .. stop of every row.

    c : (rows, cols) float32, changed in those columns
    upper : (stop - start, cols - start) float32, U from row and column `start` on
    step : (cols,) float32; row_scale : (rows,) float32: the grid is step * row_scale
    dead : rounding thresholds lie at (m + 1/2 + dead) grid steps
    shrink : grid value m stands for m - shrink, m >= 1
    top : largest code
    codes : (rows, cols) int8, written; error : (rows, >= stop - start) float32, written: e of each column
    """
    _quantize_run_in_parts(
        c.shape[0], num_threads(), c, start, stop, upper, step, row_scale, dead, shrink, top, codes, error
    )


def _count_codes(columns, counts, begin, end):
    for k in range(begin, end):
        for v in range(256):
            counts[k, v] = 0
        for r in range(columns.shape[1]):
            counts[k, np.int64(columns[k, r]) + 128] += 1


_count_codes_in_parts = in_parts(_count_codes)


def count_codes(columns: Any, counts: Any) -> None:
    """counts[k, v + 128] = how often the value v stands in columns[k].

    columns : (cols, rows) int8; counts : (cols, 256) int64, written
    """
    _count_codes_in_parts(columns.shape[0], num_threads(), columns, counts)
