"""Coefficients to codes: the encoder's loops.

A value t = |c| - dead_zone gets the code m = clamp(floor(t / s), 0, h - 1), h = 2^(bits-1), and is read back
as sign * (dead_zone + s * (m + 1/2)). The scale s of a group minimises the sum of squared errors: a grid of
candidates below max(t) / h, then the least-squares scale for these codes, twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import cpu_inline
from ._parts import in_parts
from ._pool import num_threads
from .simd import narrow, widen

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_MAX_GROUP = 128
_TINY = np.float32(1e-30)
# Steps of the grid, as factors of max(t) / h. Few levels want the tail clipped, many levels do not: at 2 bits
# the best uniform step of a Gaussian group of 64 is near 0.8 of the maximum's, at 4 bits near 1, at 8 bits 1.
_GRID_FINE = np.array([1.0], np.float32)
_GRID_MIDDLE = np.array([1.0, 0.95, 0.9], np.float32)
_GRID_COARSE = np.array([1.05, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.63, 0.55], np.float32)


@cpu_inline
def _level(t, inverse, top):
    """m + 1/2 for t / s, as float32. Not a number cannot occur: the encoder refuses it before."""
    m = np.floor(t * inverse)
    m = m if m > _ZERO else _ZERO
    m = m if m < top else top
    return m + _HALF


@cpu_inline
def _squared_error(t, count, s, top):
    inverse = _ONE / s
    err = _ZERO
    for k in range(count):
        diff = t[k] - s * _level(t[k], inverse, top)
        err += diff * diff
    return err


@cpu_inline
def _least_squares(t, count, s, top):
    """The least-squares scale of the codes that scale `s` gives: <t, l> / <l, l>."""
    inverse = _ONE / s
    tl, ll = _ZERO, _ZERO
    for k in range(count):
        level = _level(t[k], inverse, top)
        tl += t[k] * level
        ll += level * level
    return tl / ll


@cpu_inline
def _best_scale(t, count, half, grid):
    largest = _ZERO
    for k in range(count):
        largest = t[k] if t[k] > largest else largest
    if not largest > _TINY:
        return _ZERO
    top = half - _ONE
    best, best_err = largest / half, np.float32(np.inf)
    for g in range(grid.shape[0]):
        s = grid[g] * largest / half
        err = _squared_error(t, count, s, top)
        if err < best_err:
            best, best_err = s, err
    for _ in range(2):
        s = _least_squares(t, count, best, top)
        if not s > _TINY:
            break
        err = _squared_error(t, count, s, top)
        if err >= best_err:
            break
        best, best_err = s, err
    return best


def _quantize_rows(c, width, group, dead_zone, scale, codes, error, begin, end):
    cols = c.shape[1]
    half = np.float32(1 << (width - 1))
    top = half - _ONE
    grid = _GRID_COARSE if width <= 4 else (_GRID_MIDDLE if width <= 8 else _GRID_FINE)
    store = codes.shape[0] > 0
    for r in range(begin, end):
        t = np.empty(_MAX_GROUP, np.float32)
        row_error = np.float64(0)
        for g in range(scale.shape[1]):
            start = g * group
            count = min(group, cols - start)
            for k in range(count):
                t[k] = abs(c[r, start + k]) - dead_zone
            scale[r, g] = narrow(scale, _best_scale(t, count, half, grid))
            s = widen(scale[r, g])
            err = _ZERO
            # a zero scale reads back as +-dead_zone whatever the code
            inverse = _ONE / s if s > _ZERO else _ZERO
            for k in range(count):
                level = _level(t[k], inverse, top)
                diff = t[k] - s * level
                err += diff * diff
                if store:
                    m = np.int32(level)
                    u = np.int32(half) + m if c[r, start + k] >= _ZERO else np.int32(half) - 1 - m
                    codes[r, start + k] = np.uint16(u)
            row_error += np.float64(err)
        error[r] = row_error


_quantize_rows_in_parts = in_parts(_quantize_rows)


def quantize_rows(c: Any, width: Any, group: Any, dead_zone: Any, scale: Any, codes: Any, error: Any) -> None:
    """Codes and scales of the rows of c, and each row's squared error.

    c : (rows, cols) float32; width : bits; dead_zone : float32
    scale : (rows, ceil(cols / group)) uint16, float16 bits, written
    codes : (rows, cols) uint16, written; a (0, 0) array asks for the error only
    error : (rows,) float64, written
    """
    _quantize_rows_in_parts(c.shape[0], num_threads(), c, width, group, dead_zone, scale, codes, error)


def _mark_stored(c, threshold, max_gap, keep, begin, end):
    cols = c.shape[1]
    for r in range(begin, end):
        for k in range(cols):
            keep[r, k] = np.uint8(1) if abs(c[r, k]) > threshold else np.uint8(0)
        if max_gap > 0:
            previous = -1
            for k in range(cols):
                if keep[r, k] == 0:
                    continue
                while k - previous > max_gap:
                    best = previous + max_gap // 2
                    for j in range(best + 1, previous + max_gap + 1):
                        if abs(c[r, j]) > abs(c[r, best]):
                            best = j
                    keep[r, best] = 1
                    previous = best
                previous = k


_mark_stored_in_parts = in_parts(_mark_stored)


def mark_stored(c: Any, threshold: Any, max_gap: Any, keep: Any) -> None:
    """keep[r, c] = |c| > threshold; where two marked columns (or the row's start) are more than `max_gap`
    apart, the largest coefficient of the far half of the gap is marked too. max_gap = 0: no limit.

    c : (rows, cols) float32; keep : (rows, cols) uint8, written
    """
    _mark_stored_in_parts(c.shape[0], num_threads(), c, threshold, max_gap, keep)


def _row_counts(keep, count, begin, end):
    for r in range(begin, end):
        total = np.int64(0)
        for k in range(keep.shape[1]):
            total += np.int64(keep[r, k])
        count[r] = total


_row_counts_in_parts = in_parts(_row_counts)


def row_counts(keep: Any, count: Any) -> None:
    """count[r] = number of ones of keep[r]. keep : (rows, cols) uint8; count : (rows,) int64."""
    _row_counts_in_parts(keep.shape[0], num_threads(), keep, count)


def _collect(c, keep, row_start, value, skipped, begin, end):
    for r in range(begin, end):
        e = row_start[r]
        previous = -1
        for k in range(c.shape[1]):
            if keep[r, k] != 0:
                value[e] = c[r, k]
                skipped[e] = np.uint8((k - previous - 1) & 255)
                previous = k
                e += 1


_collect_in_parts = in_parts(_collect)


def collect(c: Any, keep: Any, row_start: Any, value: Any, skipped: Any) -> None:
    """Marked coefficients in stored order, and the columns skipped before each (modulo 256).

    value : (entries,) float32; skipped : (entries,) uint8
    """
    _collect_in_parts(c.shape[0], num_threads(), c, keep, row_start, value, skipped)
