"""Packed codes, or those of nested bit planes, to bytes, as the int8 matmuls multiply them."""

from __future__ import annotations

import numpy as np

from . import params
from ._atomics import call_address
from ._jit import cpu_inline
from ._parts import address_at, c_function, record_at
from .arrays import array_address, bytes_at
from .exceptions import exception_column, exception_delta, exceptions_from
from .int8_simd import RUN, int16_sums, store_cut_run, store_run, unpack_bytes

_WEIGHT = params.WEIGHT.dtype


@cpu_inline
def run_bytes(stream, at, bits):
    """The 32 codes of `bits` bits at byte `at`."""
    if bits == 8:
        return unpack_bytes(8, stream, at)
    if bits == 7:
        return unpack_bytes(7, stream, at)
    if bits == 6:
        return unpack_bytes(6, stream, at)
    if bits == 5:
        return unpack_bytes(5, stream, at)
    if bits == 4:
        return unpack_bytes(4, stream, at)
    if bits == 3:
        return unpack_bytes(3, stream, at)
    return unpack_bytes(2, stream, at)


@cpu_inline
def _packed_rows_of_bytes(w, offset, r0, nrows, column, depth, lines, at, row):
    """`rows_of_bytes` without exceptions and without cutting."""
    if w.planes_of_rows != 0:
        call_address(
            w.planes_of_rows,
            (address_at(w), r0, nrows, column, depth, np.int64(offset), array_address(lines) + at, row),
        )
        return
    stream, bits = bytes_at(w.value), w.bits
    shift = (1 << (bits - 1)) - offset
    for r in range(nrows):
        byte = ((r0 + r) * w.row_values + column) // 8 * bits
        for k in range(0, depth, RUN):
            store_run(run_bytes(stream, byte, bits), shift, lines, at + r * row + k)
            byte += 4 * bits


@cpu_inline
def _add_exceptions(w, row, column, depth, lines, at):
    """lines[at + k] += what integer [row, column + k] has beyond its packed code, modulo 256, k < depth."""
    e, stop = exceptions_from(w, row, column)
    while e < stop and exception_column(w, e) < column + depth:
        lines[at + exception_column(w, e) - column] += np.uint8(exception_delta(w, e))
        e += 1


@cpu_inline
def row_of_bytes(w, offset, row, column, depth, lines, at):
    """lines[at + k] = q[row, column + k] + offset modulo 256, k < depth, as bytes. w : record of `WEIGHT`"""
    _packed_rows_of_bytes(w, offset, row, 1, column, depth, lines, at, 0)
    if w.exception_start != 0:
        _add_exceptions(w, row, column, depth, lines, at)


def _row_of_bytes(weight, row, cols, line):
    """line[k] = q[row, k] as a byte, k < cols. weight : address of a `params.WEIGHT`. line : address of bytes"""
    row_of_bytes(record_at(weight, _WEIGHT), 0, row, 0, cols, bytes_at(line), 0)


#: A C function of these arguments, for kernels that run once: inlined, every width compiles anew in each.
ROW_OF_BYTES = c_function(_row_of_bytes)


@cpu_inline
def write_row_of_bytes(function, weight, row, line):
    """line[k] = q[row, k] as a byte. function : address of `ROW_OF_BYTES`. line (cols,) uint8"""
    call_address(function, (weight, np.int64(row), np.int64(line.shape[0]), array_address(line)))


@cpu_inline
def rows_of_bytes(w, offset, base_bits, r0, nrows, column, depth, lines, at, row):
    """lines[at + r row + k] = q[r0 + r, column + k] + offset, r < nrows, k < depth, as bytes.

    w : record of `WEIGHT`, of b-bit codes
    base_bits : that q is cut to, where products are added in int16
    """
    bits, half = w.bits, 1 << (base_bits - 1)
    cut = int16_sums() and bits > base_bits
    if not cut:
        _packed_rows_of_bytes(w, half if int16_sums() else offset, r0, nrows, column, depth, lines, at, row)
        if w.exception_start == 0:
            return
    stream = bytes_at(w.value)
    for r in range(nrows):
        line = at + r * row
        if not int16_sums():
            _add_exceptions(w, r0 + r, column, depth, lines, line)
        elif not cut:  # packed codes are in range: only exceptions are cut
            e, stop = exceptions_from(w, r0 + r, column)
            while e < stop and exception_column(w, e) < column + depth:
                k = line + exception_column(w, e) - column
                u = np.int32(lines[k]) + exception_delta(w, e)
                lines[k] = np.uint8(min(max(u, 0), 2 * half - 1))
                e += 1
        elif w.exception_start != 0:
            row_of_bytes(w, 0, r0 + r, column, depth, lines, line)
            for k in range(line, line + depth, RUN):
                store_cut_run(unpack_bytes(8, lines, k), 0, half, lines, k)
        else:
            byte = ((r0 + r) * w.row_values + column) // 8 * bits
            for k in range(line, line + depth, RUN):
                store_cut_run(run_bytes(stream, byte, bits), 1 << (bits - 1), half, lines, k)
                byte += 4 * bits
