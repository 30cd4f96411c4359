"""Integers of grid codes cut to few bits, and the exceptions: see `rbe_gpu.codecs.cut`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import cpu_kernel

_WORD = 8  # integers that are compared at a time


@cpu_kernel
def _count(q, half, counts):
    """counts[r] += integers of row r that are not -half to half - 1; q (cols, rows) int8."""
    span = np.uint8(2 * half - 1)
    for c in range(q.shape[0]):
        for r in range(counts.shape[0]):
            counts[r] += np.int32(np.uint8(q[c, r] + half) > span)


@cpu_kernel
def _cut(q, words, low, high, line, line_words, ends, column, delta):
    """Cut integers to low to high, minus low; what they lack goes to the ends of rows, which move on.

    q (cols, rows) int8, rows a multiple of 8; words : the same as uint64. line, line_words : of a column
    """
    rows = q.shape[1]
    for c in range(q.shape[0]):
        for r in range(rows):
            line[r] = min(max(q[c, r], low), high)
        for k in range(rows // _WORD):
            if words[c, k] != line_words[k]:
                for r in range(_WORD * k, _WORD * k + _WORD):
                    if q[c, r] != line[r]:
                        e = ends[r]
                        column[e], delta[e] = c, np.int8(q[c, r] - line[r])
                        ends[r] = e + 1
        for r in range(rows):
            q[c, r] = line[r] - low


def count_exceptions(q: Any, rows: int, base_bits: int) -> Any:
    """Where the exceptions of each row start when integers are cut to `base_bits`: (rows + 1,) int64.

    q : (cols, at least `rows`) int8
    """
    counts = np.zeros(rows, np.int32)
    _count(q, 1 << (base_bits - 1), counts)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def cut(q: Any, base_bits: int, row_start: Any, column: Any, delta: Any) -> None:
    """Overwrite integers with cut + 2^(base_bits-1), and write the exceptions.

    Parameters
    ----------
    q : (cols, rows) int8, C-contiguous; rows is a multiple of 8, and those behind the rows in use are zeros
    row_start : of `count_exceptions`
    column, delta : (row_start[-1],) uint16 and int8
    """
    line, ends, half = np.empty(q.shape[1], np.int8), row_start[:-1].copy(), 1 << (base_bits - 1)
    _cut(
        q,
        q.view(np.uint64),
        np.int8(-half),
        np.int8(half - 1),
        line,
        line.view(np.uint64),
        ends,
        column,
        delta,
    )
