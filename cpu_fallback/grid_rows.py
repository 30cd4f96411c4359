"""Grid codes as Rice codes of rows, of which only whole rows are read: `rbe_gpu.codecs.grid.GridRows`.

A number n >= 0 with parameter k is n >> k zeros, a one and the low k bits of n, from the lowest bit up (Rice and
Plaunt 1971, "Adaptive variable-length coding for efficient compression of spacecraft television data").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import params
from ._jit import cpu_inline, cpu_kernel
from ._parts import in_parts
from ._pool import num_threads
from .arrays import address
from .bit_planes import ones, store_word, word_at
from .codes import scale_integers
from .int8_codes import ROW_OF_BYTES, write_row_of_bytes
from .operand import grid_fields
from .simd import bits, widen

_ZERO = np.float32(0)
_SLACK = 8  # bytes behind the last row, which `word_at` reads and `store_word` writes
_ROWS_OF_START = 32  # rows of a start; the sizes of those before a row are added
_LONG = 255  # a size that two more bytes hold
_CHUNK = 1024  # rows whose integers are made at a time
#: n >> k at most, so that the codes of a gap, a sign and a size have 47 bits together: any 57 bits are one load.
_MOST_ZEROS = 15
#: Of a row's integers that are not zero, above which gaps do not pay.
_MOST_DENSITY = 0.6
# the first byte of a row: k of its gaps or of its integers, k of its sizes, and whether all integers have codes
_SIZE_SHIFT, _LOW_4, _LOW_3, _ALL = 4, 15, 7, 128
_GAPS, _SIZES, _EVERY = range(3)  # kinds of numbers


@cpu_inline
def _bits(numbers, count, k):
    """Bits of the codes of numbers[:count] (uint16) with parameter k."""
    zeros = np.uint32(0)
    for i in range(count):
        zeros += np.uint32(numbers[i] >> k)
    return np.int64(zeros) + count * (k + 1)


@cpu_inline
def _best(numbers, count):
    """The parameter with which the codes of numbers[:count] (uint16) take least bits, and how many these are."""
    most, k = 0, 0
    for i in range(count):
        most = max(most, np.int64(numbers[i]))
    while most >> k > _MOST_ZEROS:
        k += 1
    least, further = _bits(numbers, count, k), _bits(numbers, count, k + 1)
    while further < least:
        k, least = k + 1, further
        further = _bits(numbers, count, k + 1)
    return k, least


@cpu_inline
def _code(number, k):
    """A code, and how many bits it has."""
    zeros = number >> k
    return (((number & ((1 << k) - 1)) << 1) | 1) << zeros, zeros + 1 + k


@cpu_inline
def _append(code, length, part, filled, out, at):
    """Write a code of up to 56 bits behind the `filled` low bits of `part`, which are the next of byte `at`.

    Returns
    -------
    The same of what follows: part, of less than 8 bits, filled and at
    """
    part |= code << filled
    store_word(out, at, part)  # what is above the code is written again
    filled += length
    return part >> (filled & ~7), filled & 7, at + (filled >> 3)


@cpu_inline
def _numbers(kind, line, columns, count, numbers):
    """Write the numbers of a row that have codes of a kind, and return how many these are.

    columns : of its integers that are not zero, of which there are `count`
    """
    if kind == _EVERY:
        for c in range(line.shape[0]):
            q = np.int32(np.int8(line[c]))
            numbers[c] = 2 * q - 1 if q > 0 else -2 * q
        return line.shape[0]
    last = -1
    for i in range(count):
        c = columns[i]
        numbers[i] = c - last - 1 if kind == _GAPS else abs(np.int32(np.int8(line[c]))) - 1
        last = c
    return count


@cpu_kernel
def _write_rows(row_of_bytes, weight, rows, line, columns, numbers, row_start, out):
    """The sizes and codes of all rows, and where every 32nd begins.

    row_of_bytes : address of `ROW_OF_BYTES`. weight : of a `params.WEIGHT`. line (cols,) uint8,
    columns (cols + 1,) int32, numbers (cols,) uint16 : scratch memory

    Returns
    -------
    Bytes written
    """
    end, cols = 0, line.shape[0]
    for r in range(rows):
        if r % _ROWS_OF_START == 0:
            row_start[r // _ROWS_OF_START] = end
        write_row_of_bytes(row_of_bytes, weight, r, line)
        count = 0
        for c in range(cols):  # without a branch, which the processor would often guess wrong
            columns[count] = c
            count += line[c] != 0
        if count == 0:
            out[end] = 0
            end += 1
            continue
        sparse = count < cols * _MOST_DENSITY
        k_gap, k_size, k, size_in_bits, every = 0, 0, 0, count, False
        for kind in range(_GAPS if sparse else _EVERY, _EVERY + 1):
            # the codes of all integers take a bit each, and two more for each that is not zero, at least
            if kind == _EVERY and sparse and size_in_bits <= cols + 2 * count:
                break
            k, bits_of_kind = _best(numbers, _numbers(kind, line, columns, count, numbers))
            if kind == _GAPS:
                k_gap = k
            elif kind == _SIZES:
                k_size = k
            else:
                every = not sparse or bits_of_kind < size_in_bits
                size_in_bits = bits_of_kind if every else size_in_bits
                break
            size_in_bits += bits_of_kind
        size = 1 + (size_in_bits + 7) // 8
        out[end] = min(size, _LONG)
        if size >= _LONG:
            out[end + 1], out[end + 2] = size & 255, size >> 8
            end += 2
        out[end + 1] = k | _ALL if every else k_gap | k_size << _SIZE_SHIFT
        part, filled, at = np.int64(0), np.int64(0), end + 2
        end += 1 + size
        last = -1
        for i in range(cols if every else count):
            if every:
                code, length = _code(np.int64(numbers[i]), k)
            else:
                c = np.int64(columns[i])
                q = np.int64(np.int8(line[c]))
                code, length = _code(c - last - 1, k_gap)
                size_code, size_length = _code(abs(q) - 1, k_size)
                code |= ((q > 0) | size_code << 1) << length
                length += 1 + size_length
                last = c
            part, filled, at = _append(code, length, part, filled, out, at)
    return end


@cpu_inline
def _zeros(window):
    """Zeros below the lowest one; 64 where there is none."""
    return ones((window & -window) - 1)


@cpu_inline
def _integers(value, start, stop, out, out_at, cols):
    """out[out_at + c] = integer c of the row whose bytes are start to stop, c < cols."""
    for c in range(cols):
        out[out_at + c] = _ZERO
    if start == stop:
        return
    parameters = np.int64(value[start])
    k_gap, k_size = parameters & _LOW_4, parameters >> _SIZE_SHIFT & _LOW_3
    low_gap, low_size = (1 << k_gap) - 1, (1 << k_size) - 1
    bit, end = 8 * (start + 1), 8 * stop
    # of a window the low 57 bits are those behind `bit`; what is shifted in above them is not reached
    if parameters & _ALL:
        for c in range(out_at, out_at + cols, 2):  # the codes of two integers have 42 bits at most
            window = word_at(value, bit >> 3) >> (bit & 7)
            for k in range(2):
                zeros = _zeros(window)
                window >>= zeros + 1
                n = zeros << k_gap | window & low_gap
                window >>= k_gap
                bit += zeros + 1 + k_gap
                size = (n + 1) >> 1
                out[c + k] = np.float32(size if n & 1 else -size)
        return
    c = out_at
    while True:
        window = word_at(value, bit >> 3) >> (bit & 7)
        zeros = _zeros(window)
        bit += zeros + 2 + k_gap
        if bit > end:  # zeros complete the last byte: the one is behind it
            break
        window >>= zeros + 1
        c += zeros << k_gap | window & low_gap
        window >>= k_gap
        positive = window & 1
        window >>= 1
        zeros = _zeros(window)
        size = 1 + (zeros << k_size | window >> (zeros + 1) & low_size)
        bit += zeros + 1 + k_size
        out[c] = np.float32(size if positive else -size)
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


def codes_of_rows(codes: Any) -> tuple[Any, Any]:
    """`value` and `row_start` of `GridRows` with the integers of `GridCodes`."""
    rows, cols = codes.value.shape[0], len(codes.col_scale)
    record = params.WEIGHT.record(value=address(codes.value), row_values=cols, **grid_fields(codes))
    row_start = np.empty(-(-rows // _ROWS_OF_START), np.uint32)
    # the most; the system gives memory only for what is written
    value = np.empty(rows * (2 * cols + 3) + _SLACK, np.uint8)
    line, columns = np.empty(cols, np.uint8), np.empty(cols + 1, np.int32)
    numbers = np.empty(cols, np.uint16)
    weight = address(record.view(np.uint8))
    size = _write_rows(ROW_OF_BYTES(), weight, rows, line, columns, numbers, row_start, value)
    value[size : size + _SLACK] = 0
    return value[: size + _SLACK].copy(), row_start


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
