"""c (+)= A x in registers, A sparse or dense rows: the inner loops of every matmul over a tile of tokens.

Activations lie feature by feature in tiles of up to 64 tokens: x[tile, feature, token]. Sixteen tokens are a
vector, a tile is one to four of them, and a stored coefficient is one broadcast and one fused multiply-add
per vector; nothing is unpacked for positions that are not stored, and no dense weight exists.
"""

from __future__ import annotations

import numpy as np

from ._jit import cpu_inline
from ._parts import c_function
from .arrays import floats_at, ints_at, longs_at
from .simd import element, vadd, vblock, vfma, vload, vsplat, vstore, wide_registers
from .unpack import vbroadcast

TILE = 64  # tokens of a tile
_ZERO = np.float32(0)


@cpu_inline
def _row_4(start, stop, offset, step, value, x, x_at, fresh, c, at):
    if fresh:
        zero = vsplat(_ZERO)
        c0, c1, c2, c3 = zero, zero, zero, zero
    else:
        c0, c1, c2, c3 = vload(c, at), vload(c, at + 16), vload(c, at + 32), vload(c, at + 48)
    for e in range(start, stop):
        o = x_at + np.int64(element(offset, e)) * step
        s = vbroadcast(value, e)
        c0, c1 = vfma(s, vload(x, o), c0), vfma(s, vload(x, o + 16), c1)
        c2, c3 = vfma(s, vload(x, o + 32), c2), vfma(s, vload(x, o + 48), c3)
    vstore(c, at, c0)
    vstore(c, at + 16, c1)
    vstore(c, at + 32, c2)
    vstore(c, at + 48, c3)


@cpu_inline
def _row_2(start, stop, offset, step, value, x, x_at, fresh, c, at):
    """Two entries at a time: four independent sums hide the latency of an addition."""
    zero = vsplat(_ZERO)
    c0, c1, d0, d1 = zero, zero, zero, zero
    if not fresh:
        c0, c1 = vload(c, at), vload(c, at + 16)
    pairs = start + (stop - start) // 2 * 2
    for e in range(start, pairs, 2):
        o = x_at + np.int64(element(offset, e)) * step
        s = vbroadcast(value, e)
        c0, c1 = vfma(s, vload(x, o), c0), vfma(s, vload(x, o + 16), c1)
        o = x_at + np.int64(element(offset, e + 1)) * step
        s = vbroadcast(value, e + 1)
        d0, d1 = vfma(s, vload(x, o), d0), vfma(s, vload(x, o + 16), d1)
    if pairs < stop:
        o = x_at + np.int64(element(offset, pairs)) * step
        s = vbroadcast(value, pairs)
        c0, c1 = vfma(s, vload(x, o), c0), vfma(s, vload(x, o + 16), c1)
    vstore(c, at, vadd(c0, d0))
    vstore(c, at + 16, vadd(c1, d1))


@cpu_inline
def _row_1(start, stop, offset, step, value, x, x_at, fresh, c, at):
    """Four entries at a time."""
    zero = vsplat(_ZERO)
    c0, c1, c2, c3 = zero, zero, zero, zero
    if not fresh:
        c0 = vload(c, at)
    fours = start + (stop - start) // 4 * 4
    for e in range(start, fours, 4):
        o0 = x_at + np.int64(element(offset, e)) * step
        o1 = x_at + np.int64(element(offset, e + 1)) * step
        o2 = x_at + np.int64(element(offset, e + 2)) * step
        o3 = x_at + np.int64(element(offset, e + 3)) * step
        c0 = vfma(vbroadcast(value, e), vload(x, o0), c0)
        c1 = vfma(vbroadcast(value, e + 1), vload(x, o1), c1)
        c2 = vfma(vbroadcast(value, e + 2), vload(x, o2), c2)
        c3 = vfma(vbroadcast(value, e + 3), vload(x, o3), c3)
    for e in range(fours, stop):
        o = x_at + np.int64(element(offset, e)) * step
        c0 = vfma(vbroadcast(value, e), vload(x, o), c0)
    vstore(c, at, vadd(vadd(c0, c1), vadd(c2, c3)))


@cpu_inline
def sparse_rows(rows, start, first, step_start, offset, step, value, x, x_at, vectors, fresh, c, at, width):
    """c[r] (+)= sum_e value[e] x[offset[e]], e from start[first + r * step_start] to the next start, r <
    rows.

    c and x hold rows of `width` tokens, of which 16 * `vectors` are computed; `offset` counts in units of
    `step` floats from x_at. `fresh` overwrites c, otherwise it is added to.
    """
    for r in range(rows):
        a = start[first + r * step_start]
        b = start[first + r * step_start + 1]
        if b > a or fresh:
            if vectors == 4:
                _row_4(a, b, offset, step, value, x, x_at, fresh, c, at + r * width)
            else:
                if vectors >= 2:
                    _row_2(a, b, offset, step, value, x, x_at, fresh, c, at + r * width)
                if vectors != 2:
                    skip = vectors // 2 * 32
                    _row_1(a, b, offset, step, value, x, x_at + skip, fresh, c, at + r * width + skip)


def _sparse_rows(rows, start, step_start, offset, step, value, x, vectors, fresh, c, width):
    """`sparse_rows`, arrays by their addresses."""
    sparse_rows(
        rows, longs_at(start), 0, step_start, ints_at(offset), step, floats_at(value), floats_at(x), 0, vectors,
        fresh != 0, floats_at(c), 0, width,
    )  # fmt: skip


#: For the few rows of a basis.
SPARSE_ROWS = c_function(_sparse_rows)


@cpu_inline
def dense_rows(rows, depth, a, a_at, a_row, x, x_at, vectors, fresh, c, at, width):
    """c[r] (+)= sum_k a[r, k] x[k], r < rows: `a` (rows, depth) times a tile, 16 sums in
    registers."""
    fours = rows // 4 * 4
    accumulate = not fresh
    for r in range(0, fours, 4):
        a_r, c_r = a_at + r * a_row, at + r * width
        if wide_registers():
            if vectors == 4:
                vblock(4, 4, accumulate, depth, a, a_r, a_row, 1, x, x_at, width, c, c_r, width)
            else:
                if vectors >= 2:
                    vblock(4, 2, accumulate, depth, a, a_r, a_row, 1, x, x_at, width, c, c_r, width)
                if vectors != 2:
                    skip = vectors // 2 * 32
                    vblock(
                        4, 1, accumulate, depth, a, a_r, a_row, 1, x, x_at + skip, width, c, c_r + skip, width
                    )
        else:
            for v in range(vectors):
                vblock(
                    4, 1, accumulate, depth, a, a_r, a_row, 1, x, x_at + 16 * v, width, c, c_r + 16 * v, width
                )
    for r in range(fours, rows):
        for v in range(vectors):
            vblock(
                1, 1, accumulate, depth, a, a_at + r * a_row, a_row, 1, x, x_at + 16 * v, width,
                c, at + r * width + 16 * v, width,
            )  # fmt: skip
