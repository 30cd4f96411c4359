"""Integers cut to few bits, with exceptions: the form of grid codes in memory.

    q = cut + delta,   cut = min(max(q, -2^(b-1)), 2^(b-1) - 1)

A few large integers set the width of all where every integer has as many bits. So b, `base_bits`, is chosen for each
matrix, and the integers that are not of b bits are exceptions: a column and a delta each, 3 bytes. (Databases keep
columns so: Zukowski et al. 2006, "Super-Scalar RAM-CPU Cache Compression".)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Array, on_host

LEAST_BITS = 2
#: Cost of an exception in bits: 24 in memory, and 16 for its time. A matmul of one token takes 0.33 ns for it (Zen 5,
#: a thread), in which a core reads 17 bits at 6.6 GB/s; where a weight stays in the caches, it costs more than that.
EXCEPTION_BITS = 40
_START_BITS = 32  # of a row in `row_start`, at most
_MOST_COLUMNS = 1 << 16
_MOST = (1 << 31) - 1
# Of large matrices an eighth, in runs of 256 integers, chooses the width. The runs are drawn at random: at equal
# distances they may all lie in the same rows, and rows that are sorted into bands differ in spread
_SAMPLE, _PART, _LARGE = 256, 8, 1 << 16
_CHUNK = 1 << 20  # integers whose exceptions are found at a time: a byte each, and 60 for an exception


@dataclass(frozen=True)
class Exceptions:
    """Exceptions of a matrix, sorted by row, then by column.

    Attributes
    ----------
    row_start : (rows + 1,) uint16 of up to 65,535 exceptions, else int32; those of row r are row_start[r] up to
        row_start[r + 1]
    column : (exceptions,) uint16
    delta : (exceptions,) int8, the integer minus the value that it is cut to
    """

    row_start: Array
    column: Array
    delta: Array

    @property
    def nbytes(self) -> int:
        return int(self.row_start.nbytes + self.column.nbytes + self.delta.nbytes)

    def map_arrays(self, function: Callable[[Array], Array]) -> Exceptions:
        return Exceptions(function(self.row_start), function(self.column), function(self.delta))

    def add_to(self, q: NDArray[np.int8]) -> None:
        """q[row, column] += delta, in place; q (rows, cols) int8 of values that were cut."""
        rows = np.repeat(np.arange(len(q)), np.diff(on_host(self.row_start)))
        q[rows, on_host(self.column)] += on_host(self.delta)


def cut_columns(
    q: NDArray[np.int8], bits: int, rows: int, row_order: NDArray[np.int64] | None = None
) -> tuple[int, Exceptions | None]:
    """Cut integers to the number of bits that costs least.

    Parameters
    ----------
    q : (cols, rows rounded up to a multiple of 8) int8, C-contiguous, of `bits` bits; overwritten with
        cut + 2^(base_bits-1), which are uint8. What is behind the rows has no meaning
    bits : 2 to 8
    rows : rows in use
    row_order : (rows,) int64, the row of the matrix at each row of q; None: the same

    Returns
    -------
    base_bits, and the exceptions; None where there are none
    """
    q[:, rows:] = 0
    base_bits, exceptions = _cheapest(q, bits, rows), None
    if base_bits < bits:
        places = _places(q, bits, base_bits, rows)
        if places is None:
            base_bits = bits  # the sample misled
        elif places:
            exceptions = _exceptions(q, base_bits, rows, places, row_order)
    low, high = _range(base_bits)
    if exceptions is not None:
        np.clip(q, low, high, out=q)
    q -= np.int8(low)
    return base_bits, exceptions


def _range(base_bits: int) -> tuple[int, int]:
    return -(1 << (base_bits - 1)), (1 << (base_bits - 1)) - 1


def _outside(q: NDArray[np.int8], base_bits: int, scratch: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which integers are not of `base_bits` bits, in `scratch` of q's shape: new arrays take 6 times as long."""
    low, high = _range(base_bits)
    # uint8: integers below the range wrap around
    np.add(q.view(np.uint8), np.uint8(-low), out=scratch)
    outside: NDArray[np.bool_] = np.greater(scratch, np.uint8(high - low), out=scratch.view(np.bool_))
    return outside


def _places(q: NDArray[np.int8], bits: int, base_bits: int, rows: int) -> list[NDArray[np.intp]] | None:
    """Flat indices of the exceptions of q (cols, rows), those of some columns at a time.

    None where they cost more than they save: 8 bytes each are taken only for fewer.
    """
    cols, stride = q.shape
    step = max(1, _CHUNK // stride)
    scratch = np.empty((min(step, cols), stride), np.uint8)
    places, count = [], 0
    for start in range(0, cols, step):
        part = q[start : start + step]
        at = np.flatnonzero(_outside(part, base_bits, scratch[: len(part)]))
        count += at.size
        if count > _MOST or _cost(base_bits, count, rows, cols) >= bits * rows * cols:
            return None
        if at.size:
            at += start * stride
            places.append(at)
    return places


def _exceptions(
    q: NDArray[np.int8],
    base_bits: int,
    rows: int,
    places: list[NDArray[np.intp]],
    row_order: NDArray[np.int64] | None,
) -> Exceptions:
    parts = [_sorted(q, base_bits, rows, at, row_order) for at in places]
    counts = sum(np.bincount(row, minlength=rows) for row, _, _ in parts)
    row_start = np.concatenate([[0], np.cumsum(counts)])
    starts = row_start.astype(np.uint16 if row_start[-1] < 1 << 16 else np.int32)
    if len(parts) == 1:
        return Exceptions(starts, *parts[0][1:])
    column, delta = np.empty(row_start[-1], np.uint16), np.empty(row_start[-1], np.int8)
    ends = row_start[:-1].copy()
    for row, columns, deltas in parts:
        of_row = np.bincount(row, minlength=rows)
        to = (ends - (np.cumsum(of_row) - of_row))[row] + np.arange(len(row))
        column[to], delta[to] = columns, deltas
        ends += of_row
    return Exceptions(starts, column, delta)


def _sorted(
    q: NDArray[np.int8],
    base_bits: int,
    rows: int,
    at: NDArray[np.intp],
    row_order: NDArray[np.int64] | None,
) -> tuple[NDArray[Any], NDArray[np.uint16], NDArray[np.int8]]:
    """Row, column and delta of the exceptions at these places of q (cols, rows), by row, then by column."""
    column = at // q.shape[1]
    row = at - column * q.shape[1]
    if row_order is not None:
        row = row_order[row]
    # NumPy sorts 16 bits in linear time
    short: NDArray[Any] = row.astype(np.uint16 if rows <= 1 << 16 else np.int32)
    order = np.argsort(short, kind="stable")
    values = q.reshape(-1)[at[order]]
    return short[order], column[order].astype(np.uint16), values - np.clip(values, *_range(base_bits))


def _cost(bits: int, exceptions: float, rows: int, cols: int) -> float:
    """Bits in memory, exceptions with the bits that their time is worth."""
    return bits * rows * cols + EXCEPTION_BITS * exceptions + (_START_BITS * (rows + 1) if exceptions else 0)


@lru_cache(maxsize=16)  # up to a millisecond, for a few shapes
def sampled_runs(count: int) -> NDArray[np.int64]:
    """Which of `count` runs of integers choose the width, the same ones every time."""
    # not of NumPy's generators, whose import takes 10 ms
    return np.array(Random(0).choices(range(count), k=count // _PART), np.int64)


def _cheapest(q: NDArray[np.int8], bits: int, rows: int) -> int:
    """The width of least cost. q (cols, at least `rows`), C-contiguous, with zeros behind the rows."""
    cols = len(q)
    if cols > _MOST_COLUMNS:
        return bits
    sample = q
    if q.size >= _LARGE:
        runs = q.reshape(-1)[: q.size // _SAMPLE * _SAMPLE].reshape(-1, _SAMPLE)
        sample = runs[sampled_runs(len(runs))]
    scale, scratch = q.size / sample.size, np.empty(sample.shape, np.uint8)
    best, least = bits, float(bits * rows * cols)
    for b in range(bits - 1, LEAST_BITS - 1, -1):
        cost = _cost(b, scale * np.count_nonzero(_outside(sample, b, scratch)), rows, cols)
        if cost < least:
            best, least = b, cost
    return best
