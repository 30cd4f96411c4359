"""y = activation(C x^ + b) + residual for a few tokens: limited by the compressed bytes.

A tile of 16 tokens would be mostly empty, so here vectors run along a row of the weight: 32 codes are
unpacked into two registers and multiplied where they are, sparse entries pick their activations one by one.
Every token is on its own; from five tokens on the tiles of `product` are faster.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from rbe_gpu import transforms
from rbe_gpu.codecs.packing import RUN

from ._jit import cpu_inline, cpu_kernel
from .codes import BITMAP, count_bits, entry_columns, entry_values, expand
from .fixed_point import COLUMNS_OF_CODES, DIGIT_BYTES, digit_rows, multiplies_bytes, to_digits
from .operand import (
    ACTIVATION,
    B_OFFSET,
    B_VALUE,
    BIAS,
    BITS,
    BLOCK,
    COLUMN_SCALE,
    COLUMNS,
    DEPTH,
    E_OFFSET,
    E_ROOM,
    E_START,
    E_START_ROOM,
    E_VALUE,
    ENCODING,
    GROUP,
    INDEX,
    INDEX_KIND,
    KIND,
    LINE_ROOM,
    LINES,
    OUT,
    OUT_FEATURES,
    OUT_KIND,
    PANEL,
    PANELS,
    PLACES,
    RESIDUAL,
    RESIDUAL_KIND,
    ROW,
    ROW_BYTES,
    ROW_START,
    ROW_VALUES,
    ROWS,
    ROWS_PAD,
    SCALE,
    SUM_ROOM,
    SUMS,
    TOKENS,
    TRANSFORM,
    VALUE,
    WIDTH,
    Operand,
    X,
    address,
)  # fmt: skip
from .product import (
    BF16,
    F16,
    F32,
    GRID,
    HEADROOM,
    INT,
    activate,
    bfloats_at,
    bytes_at,
    floats_at,
    halves_at,
    ints_at,
    load_any,
    longs_at,
    store_any,
)  # fmt: skip
from .simd import (
    element,
    vadd,
    vfma,
    vload,
    vload_n,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vstore_n,
    vsub,
    vsum,
    wide_registers,
    widen,
)  # fmt: skip
from .unpack import multiply_1x32, multiply_1x64, run_codes, vbroadcast

_ZERO, _HALF = np.float32(0), np.float32(0.5)
# in places that only tiles need: addresses of the transform's matrix and its transpose, groups of a row, the
# activations, where they can become whole numbers, and whether they are
S_IN, S_OUT, GROUPS, IN, ENCODED, IN_FEATURES = SUMS, SUM_ROOM, WIDTH, PANEL, PANELS, DEPTH
DIGITS, WHOLE = B_VALUE, B_OFFSET


@cpu_inline
def _int_row(stream, byte, width, scale, s_at, group, cols, x, x_at, sums, sums_at):
    """sum_c scale[c // group] (u_c - middle) x_c over a row; sums[g] = the sum of a group's activations."""
    low_total, high_total = vsplat(_ZERO), vsplat(_ZERO)
    whole = cols // group
    for g in range(whole):
        low_sum, high_sum = vsplat(_ZERO), vsplat(_ZERO)
        for k in range(group // RUN):
            c = g * group + k * RUN
            low, high = run_codes(stream, byte + c // 8 * width, width)
            low_sum = vfma(low, vload(x, x_at + c), low_sum)
            high_sum = vfma(high, vload(x, x_at + c + 16), high_sum)
        s = vbroadcast(scale, s_at + g)
        low_total, high_total = vfma(s, low_sum, low_total), vfma(s, high_sum, high_total)
    for c in range(whole * group, cols, RUN):
        low, high = run_codes(stream, byte + c // 8 * width, width)
        s = vbroadcast(scale, s_at + whole)
        low_total = vfma(s, vmul(low, vload(x, x_at + c)), low_total)
        high_total = vfma(s, vmul(high, vload(x, x_at + c + 16)), high_total)
    total = vadd(low_total, high_total)
    groups = (cols + group - 1) // group
    middle = vsplat(-np.float32((1 << width) - 1) * _HALF)
    for g in range(0, groups, 16):
        count = min(16, groups - g)
        scaled = vmul(vload_n(scale, s_at + g, count), vload_n(sums, sums_at + g, count))
        total = vfma(middle, scaled, total)
    return vsum(total)


@cpu_inline
def _grid_row(stream, byte, width, shrink, cols, x, x_at):
    """sum_c (q_c - sign(q_c) shrink) x_c; the column scales are in x."""
    half, up, down, zero = (
        vsplat(np.float32(1 << (width - 1))),
        vsplat(shrink),
        vsplat(-shrink),
        vsplat(_ZERO),
    )
    low_sum, high_sum = zero, zero
    for c in range(0, cols, RUN):
        low, high = run_codes(stream, byte, width)
        low, high = vsub(low, half), vsub(high, half)
        low = vsub(low, vselect_less(low, zero, down, vselect_less(zero, low, up, zero)))
        high = vsub(high, vselect_less(high, zero, down, vselect_less(zero, high, up, zero)))
        low_sum = vfma(low, vload(x, x_at + c), low_sum)
        high_sum = vfma(high, vload(x, x_at + c + 16), high_sum)
        byte += 4 * width
    return vsum(vadd(low_sum, high_sum))


@cpu_inline
def _float_row(w, at, cols, x, x_at):
    """sum_c w_c x_c for a row of stored floats of any type."""
    zero = vsplat(_ZERO)
    a, b, c, d = zero, zero, zero, zero
    whole = cols // 64 * 64
    for k in range(0, whole, 64):
        a = vfma(vload(w, at + k), vload(x, x_at + k), a)
        b = vfma(vload(w, at + k + 16), vload(x, x_at + k + 16), b)
        c = vfma(vload(w, at + k + 32), vload(x, x_at + k + 32), c)
        d = vfma(vload(w, at + k + 48), vload(x, x_at + k + 48), d)
    for k in range(whole, cols, 16):
        count = min(16, cols - k)
        a = vfma(vload_n(w, at + k, count), vload_n(x, x_at + k, count), a)
    return vsum(vadd(vadd(a, b), vadd(c, d)))


@cpu_inline
def _entry_row(values, offsets, start, stop, x, x_at):
    """sum_e value_e x[offset_e], four sums at a time."""
    a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
    whole = start + (stop - start) // 4 * 4
    for e in range(start, whole, 4):
        a += element(values, e) * element(x, x_at + np.int64(element(offsets, e)))
        b += element(values, e + 1) * element(x, x_at + np.int64(element(offsets, e + 1)))
        c += element(values, e + 2) * element(x, x_at + np.int64(element(offsets, e + 2)))
        d += element(values, e + 3) * element(x, x_at + np.int64(element(offsets, e + 3)))
    for e in range(whole, stop):
        a += element(values, e) * element(x, x_at + np.int64(element(offsets, e)))
    return (a + b) + (c + d)


@cpu_inline
def _bitmap_row(values, e, index, byte, stop, x, x_at):
    """The same for the positions of the bitmap index[byte : stop]: values spread over their columns."""
    zero = vsplat(_ZERO)
    a, b = zero, zero
    for k in range(byte, stop, 4):
        half = e + count_bits(index, k)
        a = vfma(expand(values, e, index, k), vload(x, x_at), a)
        b = vfma(expand(values, half, index, k + 2), vload(x, x_at + 16), b)
        e = half + count_bits(index, k + 2)
        x_at += 32
    return vsum(vadd(a, b))


@cpu_inline
def _digits_of(t, token):
    """The digits of a token's activations, and the scales of its groups."""
    digits = t[COLUMNS] // COLUMNS_OF_CODES * DIGIT_BYTES
    place = t[DIGITS] + token * (digits + 4 * t[GROUPS])
    return bytes_at(place), floats_at(place + digits)


@cpu_inline
def _rows_of_int(t, token, first, rows, x, x_at, sums, sums_at, scales, scales_at, out, at, gain):
    stream, halves = bytes_at(t[VALUE]), halves_at(t[SCALE])
    cols, group, width = t[ROW_VALUES], t[GROUP], t[BITS]
    groups = (cols + group - 1) // group
    if multiplies_bytes() and t[WHOLE] != 0:
        digits, factors = _digits_of(t, token)
        for r in range(rows):
            for g in range(0, groups, 16):
                count = min(16, groups - g)
                factor = vmul(vload_n(halves, (first + r) * groups + g, count), vload_n(factors, g, count))
                vstore_n(scales, scales_at + r * groups + g, factor, count)
        digit_rows(rows, stream, first * cols // 2, scales, scales_at, cols, digits, gain, out, at)
        return
    for k in range(0, rows * groups, 16):
        count = min(16, rows * groups - k)
        vstore_n(scales, scales_at + k, vload_n(halves, first * groups + k, count), count)
    for r in range(rows):
        byte, s_at = (first + r) * cols // 8 * width, scales_at + r * groups
        # the usual forms as constants: planes and loops are then known when this is compiled
        if group == 64 and width == 4:
            y = _int_row(stream, byte, 4, scales, s_at, 64, cols, x, x_at, sums, sums_at)
        elif group == 64 and width == 8:
            y = _int_row(stream, byte, 8, scales, s_at, 64, cols, x, x_at, sums, sums_at)
        elif group == 64 and width == 3:
            y = _int_row(stream, byte, 3, scales, s_at, 64, cols, x, x_at, sums, sums_at)
        elif group == 64 and width == 2:
            y = _int_row(stream, byte, 2, scales, s_at, 64, cols, x, x_at, sums, sums_at)
        else:
            y = _int_row(stream, byte, width, scales, s_at, group, cols, x, x_at, sums, sums_at)
        out[at + r] = gain * y


@cpu_inline
def _rows_of_floats(w, t, first, rows, x, x_at, out, at):
    for r in range(rows):
        out[at + r] = _float_row(w, (first + r) * t[ROW_VALUES], t[ROW_VALUES], x, x_at)


@cpu_inline
def _through(x, x_at, matrix, block, out, at):
    """out[at : at + block] = x[x_at : x_at + block] @ matrix (block, block), not over x."""
    wide = block // 64 * 64
    for k in range(0, wide, 64):
        multiply_1x64(x, x_at, matrix, k, block, block, out, at + k)
    for k in range(wide, block, 32):
        multiply_1x32(x, x_at, matrix, k, block, block, out, at + k)


@cpu_inline
def _unit(t, reals, unit, blocks, own):
    """One block of rows for one token."""
    token, first = unit // blocks, unit % blocks * t[BLOCK]
    block, columns, out_features = t[BLOCK], t[COLUMNS], t[OUT_FEATURES]
    rows = min(block, t[ROWS_PAD] - first)
    x, sums = floats_at(t[X]), floats_at(t[X] + 4 * t[TOKENS] * columns)
    x_at, sums_at = token * columns, token * t[GROUPS]
    c, at = floats_at(t[LINES]), own * t[LINE_ROOM]
    gain, kind = reals[0], t[KIND]
    if t[ROW_START] != 0:
        row_start = longs_at(t[ROW_START])
        start, stop = row_start[first], row_start[first + rows]
        values, offsets, starts = floats_at(t[E_VALUE]), ints_at(t[E_OFFSET]), longs_at(t[E_START])
        e_own, s_own = own * t[E_ROOM], own * t[E_START_ROOM]
        entry_values(t[VALUE], t[SCALE], kind, t[BITS], t[GROUP], reals[1], gain, start, stop, values, e_own)
        index = bytes_at(t[INDEX])
        for r in range(rows):
            row = first + r
            count = row_start[row + 1] - row_start[row]
            e_at = e_own + row_start[row] - start // RUN * RUN
            if t[INDEX_KIND] == BITMAP and wide_registers():
                byte = row * t[ROW_BYTES]
                c[at + r] = _bitmap_row(values, e_at, index, byte, byte + t[ROW_BYTES], x, x_at)
            else:
                entry_columns(
                    t[INDEX_KIND], t[INDEX], row, t[ROW_BYTES], row_start[t[ROWS_PAD]], row_start[row], count, 1,
                    columns, 1, offsets, e_at, starts, s_own,
                )  # fmt: skip
                c[at + r] = _entry_row(values, offsets, e_at, e_at + count, x, x_at)
    elif kind == INT:
        _rows_of_int(t, token, first, rows, x, x_at, sums, sums_at, c, at + 2 * block, c, at, gain)
    elif kind == GRID:
        stream, scales = bytes_at(t[VALUE]), halves_at(t[SCALE])
        for r in range(rows):
            byte = (first + r) * t[ROW_VALUES] // 8 * t[BITS]
            y = _grid_row(stream, byte, t[BITS], reals[2], t[ROW_VALUES], x, x_at)
            c[at + r] = gain * widen(element(scales, first + r)) * y
    elif kind == F32:
        _rows_of_floats(floats_at(t[VALUE]), t, first, rows, x, x_at, c, at)
    elif kind == F16:
        _rows_of_floats(halves_at(t[VALUE]), t, first, rows, x, x_at, c, at)
    elif kind == BF16:
        _rows_of_floats(bfloats_at(t[VALUE]), t, first, rows, x, x_at, c, at)
    if t[TRANSFORM] != 0:
        _through(c, at, floats_at(t[S_OUT]), block, c, at + block)
        at += block
    left = min(rows, t[ROWS] - first)
    for r in range(0, left, 16):
        count = min(16, left - r)
        y = vload_n(c, at + r, count)
        if t[BIAS] != 0:
            y = vadd(y, vload_n(floats_at(t[BIAS]), t[ROW] + first + r, count))
        y = activate(y, t[ACTIVATION])
        place = token * out_features + t[ROW] + first + r
        if t[RESIDUAL] != 0:
            y = vadd(y, load_any(t[RESIDUAL], t[RESIDUAL_KIND], place, count))
        store_any(t[OUT], t[OUT_KIND], place, y, count)


@cpu_inline
def _block_in(t, token, j):
    """One block of a token's activations: widened, through S^T, times a grid's column scales."""
    in_features, block, columns = t[IN_FEATURES], t[BLOCK], t[COLUMNS]
    flat, scratch = floats_at(t[X]), floats_at(t[LINES])
    place = token * columns + j * block
    finite = vsplat(_ZERO)
    to, to_at = flat, place
    if t[S_IN] != 0:
        to, to_at = scratch, np.int64(0)
    for k in range(0, block, 16):
        count = min(16, in_features - j * block - k)
        line = load_any(t[IN], t[ENCODED], token * in_features + j * block + k, count)
        vstore(to, to_at + k, line)
        finite = vfma(vmul(line, vsplat(HEADROOM)), vsplat(_ZERO), finite)
    if t[S_IN] != 0:
        _through(scratch, 0, floats_at(t[S_IN]), block, flat, place)
    if t[KIND] == GRID:
        scales = halves_at(t[COLUMN_SCALE])
        for k in range(0, block, 16):
            vstore(flat, place + k, vmul(vload(flat, place + k), vload(scales, j * block + k)))
    return vsum(finite) == _ZERO


@cpu_kernel(parallel=True)
def vector_product(t, reals):
    """out = activation(x W^T + bias) + residual for a few tokens.

    Returns False, with nothing written, where x has a value that is not finite, or would not be times HEADROOM, and W
    is compressed.
    """
    tokens, blocks_in = t[TOKENS], t[COLUMNS] // t[BLOCK]
    for j in range(tokens * blocks_in):
        finite = _block_in(t, j // blocks_in, j % blocks_in)
        if not finite and (t[BITS] > 0 or t[ROW_START] != 0):
            return False
    x_hat, sums = floats_at(t[X]), floats_at(t[X] + 4 * tokens * t[COLUMNS])
    t[WHOLE] = 0
    if multiplies_bytes() and t[DIGITS] != 0:
        t[WHOLE] = 1
        for token in range(tokens):
            digits, factors = _digits_of(t, token)
            if not to_digits(x_hat, token * t[COLUMNS], t[COLUMNS], digits, factors):
                t[WHOLE] = 0
    if t[WHOLE] == 0 and t[KIND] == INT and t[ROW_START] == 0:
        for token in range(tokens):
            for g in range(t[GROUPS]):
                start = g * t[GROUP]
                total = vsplat(_ZERO)
                for k in range(start, min(start + t[GROUP], t[COLUMNS]), 16):
                    total = vadd(total, vload(x_hat, token * t[COLUMNS] + k))
                sums[token * t[GROUPS] + g] = vsum(total)
    blocks = (t[ROWS_PAD] + t[BLOCK] - 1) // t[BLOCK]
    for unit in numba.prange(tokens * blocks):
        _unit(t, reals, unit, blocks, numba.get_thread_id())
    return True


class VectorCall:
    """The filled table of such a product, and its memory."""

    __slots__ = ("buffer", "operand", "reals", "table")

    def __init__(self, w: Operand, n: int, in_features: int, threads: int, buffer: Any) -> None:
        block = w.block
        columns = -(-w.columns // block) * block
        self.table = t = np.zeros(PLACES, np.int64)
        t[: len(w.codes)] = w.codes
        entries = w.entry_room(block) if w.sparse else 0
        groups = 0 if w.sparse or w.plain or not w.codes[GROUP] else -(-columns // int(w.codes[GROUP]))
        lines = 2 * block + -(-block * groups // 16) * 16  # coefficients and results of a unit, its scales
        own = 4 * lines + 8 * entries + 64
        digits = 0
        kind = (w.sparse, int(w.codes[KIND]), int(w.codes[BITS]), int(w.codes[GROUP]))
        if kind == (False, INT, 4, 64) and columns % COLUMNS_OF_CODES == 0:
            digits = columns // COLUMNS_OF_CODES * DIGIT_BYTES + 4 * groups
        floats = -(-n * (columns + groups + digits // 4) // 16) * 16
        self.buffer = buffer(4 * floats + threads * own)
        at = self.buffer.ctypes.data
        t[[X, TOKENS, COLUMNS, BLOCK, GROUPS]] = at, n, columns, block, groups
        t[DIGITS] = at + 4 * n * (columns + groups) if digits else 0
        at += 4 * floats
        for place, room, nbytes, size in (
            (LINES, LINE_ROOM, 4 * lines, 4), (E_VALUE, E_ROOM, 4 * entries, 4), (E_OFFSET, E_ROOM,
            4 * entries, 4),
            (E_START, E_START_ROOM, 64, 8),
        ):  # fmt: skip
            t[place], t[room] = at, nbytes // size
            at += threads * nbytes
        t[TRANSFORM], t[IN_FEATURES] = w.transform_out, in_features
        if w.transform_in != "none":
            t[S_IN] = address(transforms.cast_synthesis(w.transform_in, block))
        if w.outward != "none":
            t[S_OUT] = address(transforms.cast_synthesis(w.outward, block, transposed=True))
        self.reals, self.operand = w.reals, w

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next call."""
        self.table[IN], self.table[ENCODED] = address(x), ENCODING[x.dtype]
