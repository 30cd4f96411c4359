"""Packed codes to bytes, as the int8 matmuls multiply them."""

from __future__ import annotations

from ._jit import cpu_inline
from .arrays import bytes_at
from .int8_simd import RUN, int16_sums, store_cut_run, store_run, unpack_bytes


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
def rows_of_bytes(w, offset, base_bits, r0, nrows, column, depth, lines, at, row):
    """lines[at + r row + k] = q[r0 + r, column + k] + offset, r < nrows, k < depth, as bytes.

    w : record of `WEIGHT`, of b-bit codes
    base_bits : that q is cut to, where products are added in int16
    """
    stream, bits, cols = bytes_at(w.value), w.bits, w.row_values
    half = 1 << (bits - 1)
    for r in range(nrows):
        byte = ((r0 + r) * cols + column) // 8 * bits
        for k in range(0, depth, RUN):
            run = run_bytes(stream, byte, bits)
            byte += 4 * bits
            if int16_sums():
                store_cut_run(run, half, 1 << (base_bits - 1), lines, at + r * row + k)
            else:
                store_run(run, half - offset, lines, at + r * row + k)
