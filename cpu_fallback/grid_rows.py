"""Grid codes as entries of their rows, of which only whole rows are read: `rbe_gpu.codecs.grid.GridRows`."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import params
from ._jit import cpu_inline, cpu_kernel
from ._parts import in_parts, record_at
from ._pool import num_threads
from .arrays import address
from .codes import grid_integers, scale_integers
from .operand import grid_fields
from .simd import bits, widen

_WEIGHT = params.WEIGHT.dtype
_GAP_BITS = 6
_LONGEST = (1 << _GAP_BITS) - 1  # columns that an entry passes over
_BYTE, _SKIP = 2, 3  # the integer is the next byte; there is none
_ZERO = np.float32(0)
_ROWS_OF_START = 32  # rows of a start; the sizes of those before a row are added
_LONG = 255  # a size that two more bytes hold
_CHUNK = 1024  # rows whose integers are made at a time


@cpu_kernel
def _write_rows(weight, rows, line, columns, row, row_start, out):
    """The sizes and entries of all rows, and where every 32nd begins.

    weight : address of a `params.WEIGHT` of grid codes. line (cols,) float32, columns (cols + 1,) int32,
    row (2 cols,) uint8 : scratch memory

    Returns
    -------
    Bytes written
    """
    w, end = record_at(weight, _WEIGHT), 0
    for r in range(rows):
        grid_integers(w, r, 0, line.shape[0], line, 0)
        count = 0
        for c in range(line.shape[0]):  # without a branch, which the processor would often guess wrong
            columns[count] = c
            count += line[c] != _ZERO
        last, at = -1, 0
        for k in range(count):
            c = columns[k]
            q, gap, last = np.int32(line[c]), c - last - 1, c
            while gap > _LONGEST:
                row[at] = _SKIP << _GAP_BITS | _LONGEST
                at += 1
                gap -= _LONGEST + 1
            large = q < -1 or q > 1
            row[at] = (_BYTE if large else (q + 1) >> 1) << _GAP_BITS | gap
            if large:
                row[at + 1] = np.uint8(q)
            at += 2 if large else 1
        if r % _ROWS_OF_START == 0:
            row_start[r // _ROWS_OF_START] = end
        out[end] = min(at, _LONG)
        if at >= _LONG:
            out[end + 1], out[end + 2] = at & 255, at >> 8
            end += 2
        out[end + 1 : end + 1 + at] = row[:at]
        end += 1 + at
    return end


@cpu_inline
def _integers(entries, start, stop, out, out_at, cols):
    """out[out_at + c] = integer c of the row whose entries are start to stop, c < cols."""
    for c in range(cols):
        out[out_at + c] = _ZERO
    at, c = start, out_at
    while at < stop:
        entry = np.int64(entries[at])
        kind = entry >> _GAP_BITS
        c += entry & _LONGEST
        at += 1
        if kind < _BYTE:
            out[c] = np.float32(2 * kind - 1)
        elif kind == _BYTE:
            out[c] = np.float32(np.int8(entries[at]))
            at += 1
        c += 1


@cpu_inline
def _row_at(rows, at):
    """First and end of the entries of the row at byte `at`."""
    size = np.int64(rows[at])
    if size == _LONG:
        return at + 3, at + 3 + (np.int64(rows[at + 1]) | np.int64(rows[at + 2]) << 8)
    return at + 1, at + 1 + size


@cpu_inline
def _row(rows, row_start, row):
    """The same of a row's number."""
    start, stop = _row_at(rows, np.int64(row_start[row // _ROWS_OF_START]))
    for _ in range(row % _ROWS_OF_START):
        start, stop = _row_at(rows, stop)
    return start, stop


def _rows(value, row_start, row_scale, col_scale, gain, shrink, rows, first, out, begin, end):
    """out[i] = gain * row_scale * col_scale[c] * (q - sign(q) * shrink) of row rows[i], or first + i for None."""
    flat, cols = out.reshape(-1), out.shape[1]
    for i in range(begin, end):
        row = first + i
        if rows is not None:
            row = rows[i]
        start, stop = _row(value, row_start, row)
        _integers(value, start, stop, flat, i * cols, cols)
        scale_integers(gain * widen(row_scale[row]), col_scale, shrink, 0, cols, flat, i * cols)


_rows_in_parts = in_parts(_rows)


def entries_of(codes: Any) -> tuple[Any, Any]:
    """`value` and `row_start` of `GridRows` with the integers of `GridCodes`."""
    rows, cols = codes.value.shape[0], len(codes.col_scale)
    record = params.WEIGHT.record(value=address(codes.value), row_values=cols, **grid_fields(codes))
    row_start = np.empty(-(-rows // _ROWS_OF_START), np.uint32)
    # the most; the system gives memory only for what is written
    value = np.empty(rows * (2 * cols + 3), np.uint8)
    line, columns, row = (
        np.empty(cols, np.float32),
        np.empty(cols + 1, np.int32),
        np.empty(2 * cols, np.uint8),
    )
    size = _write_rows(address(record.view(np.uint8)), rows, line, columns, row, row_start, value)
    return value[:size].copy(), row_start


def rows_of(codes: Any, gain: float, rows: Any, first: int, out: Any) -> None:
    """gain * coefficients of the rows `rows` (int64), or first, first + 1, ... for None; out (n, cols) float32."""
    _rows_in_parts(
        out.shape[0], num_threads(), codes.value, codes.row_start, bits(codes.row_scale), bits(codes.col_scale),
        np.float32(gain), np.float32(codes.shrink), rows, first, out,
    )  # fmt: skip


def integers_of(codes: Any) -> Any:
    """q of `GridRows`, (rows_pad, cols_pad) int8."""
    ones, rows, cols = np.float16(1), len(codes.row_scale), len(codes.col_scale)
    q, some = np.empty((rows, cols), np.int8), np.empty((_CHUNK, cols), np.float32)
    scales = bits(np.full(rows, ones)), bits(np.full(cols, ones))
    for first in range(0, rows, _CHUNK):
        out = some[: min(_CHUNK, rows - first)]
        _rows_in_parts(
            len(out),
            num_threads(),
            codes.value,
            codes.row_start,
            *scales,
            np.float32(1),
            _ZERO,
            None,
            first,
            out,
        )
        q[first : first + len(out)] = out
    return q
