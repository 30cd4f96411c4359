"""y = activation(C x^ + b) + residual for one to a few tokens: limited by the compressed bytes.

A tile of 16 tokens would be mostly empty, so here vectors run along a row of the weight: 32 codes are
unpacked into two registers and multiplied where they are, sparse entries load their activations one by one.
Every token is on its own; from five tokens on the tiles of `matmul_tiles` are faster.

In the kernels `p` is a record of `params.MATVEC`, `w` its weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rbe_gpu import transforms
from rbe_gpu.codecs.packing import RUN

from . import params
from ._atomics import call_address
from ._jit import cpu_inline, cpu_kernel
from ._parts import c_function, record_at, run_shares
from .arrays import (
    BF16,
    ENCODING,
    F16,
    F32,
    GRID,
    INT,
    address,
    bfloats_at,
    bytes_at,
    floats_at,
    halves_at,
    ints_at,
    load_any,
    longs_at,
    store_any,
)
from .codes import BITMAP, count_bits, entry_columns, entry_values, expand
from .epilogue import activate
from .exceptions import times_floats
from .int8_dot import digit_groups, digit_sums, digits_bytes, has_int8_dot, to_digits
from .int8_rows import STEP, SUMS
from .operand import MatmulCall, Operand
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
)
from .transform_in import HEADROOM
from .unpack import multiply_1x32, multiply_1x64, run_codes, vbroadcast

_ZERO, _HALF = np.float32(0), np.float32(0.5)
_MATVEC = params.MATVEC.dtype
_INPUT_AT, _WRITTEN_AT = params.MATVEC.offset("input"), params.MATVEC.offset("written")


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
    """sum_c (q_c - sign(q_c) shrink) x_c without exceptions; the column scales are in x."""
    half, up, down, zero = (
        vsplat(np.float32(1 << (width - 1))),
        vsplat(shrink),
        vsplat(-shrink),
        vsplat(_ZERO),
    )
    low_sum, high_sum = zero, zero
    if shrink == _ZERO:
        for c in range(0, cols, RUN):
            low, high = run_codes(stream, byte, width)
            low_sum = vfma(vsub(low, half), vload(x, x_at + c), low_sum)
            high_sum = vfma(vsub(high, half), vload(x, x_at + c + 16), high_sum)
            byte += 4 * width
        return vsum(vadd(low_sum, high_sum))
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
def _digits_of(p, token):
    """The digits of a token's activations, and the scales of its groups of 64."""
    digits = p.digits + token * p.digits_stride
    return bytes_at(digits), floats_at(digits + p.digits_stride - 4 * p.digit_groups)


@cpu_inline
def _rows_of_digits(p, w, token, first, rows, scales, scales_at, out, at):
    """The results of rows of codes, by digits. scales : from scales_at on room for one of every 64 codes."""
    stream, halves, bits, cols = bytes_at(w.value), halves_at(w.scale), w.bits, w.row_values
    x, x_at = floats_at(p.x), token * p.columns
    digits, factors = _digits_of(p, token)
    size, step, groups, grid = cols // 8 * bits, p.digit_groups, p.groups, w.kind == GRID
    table, table_at, table_row = factors, np.int64(0), np.int64(0)
    if not grid:
        table, table_at, table_row = scales, scales_at, step
        if w.group == STEP:
            for g in range(0, groups, 16):
                count = min(16, groups - g)
                factor = vload_n(factors, g, count)
                for r in range(rows):
                    scale = vmul(vload_n(halves, (first + r) * groups + g, count), factor)
                    vstore_n(scales, scales_at + r * step + g, scale, count)
        else:  # of 128 columns
            for r in range(rows):
                for g in range(cols // STEP):
                    s = widen(element(halves, (first + r) * groups + g // 2))
                    scales[scales_at + r * step + g] = s * factors[g]
        if step > cols // STEP:
            for r in range(rows):
                scales[scales_at + r * step + step - 1] = _ZERO
    for r in range(0, rows, SUMS):
        row, count = first + r, min(SUMS, rows - r)
        y = digit_sums(
            bits, stream, row * size, size, count, digits, cols, table, table_at + r * table_row, table_row
        )
        for i in range(count):
            total, gain = y[i], w.gain
            if grid:
                gain *= widen(element(halves, row + i))
                if w.exception_start != 0:
                    total += times_floats(w, row + i, x, x_at)
            out[at + r + i] = gain * total


@cpu_inline
def _rows_of_int(p, w, token, first, rows, x, x_at, scales, scales_at, out, at):
    stream, halves, gain = bytes_at(w.value), halves_at(w.scale), w.gain
    sums, sums_at = floats_at(p.sums), token * p.groups
    cols, group, width = w.row_values, w.group, w.bits
    groups = (cols + group - 1) // group
    for k in range(0, rows * groups, 16):
        count = min(16, rows * groups - k)
        vstore_n(scales, scales_at + k, vload_n(halves, first * groups + k, count), count)
    for r in range(rows):
        byte, s_at = (first + r) * cols // 8 * width, scales_at + r * groups
        # the usual forms as constants: planes and loops are then known at compile time
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
def _rows_of_floats(stored, w, first, rows, x, x_at, out, at):
    cols = w.row_values
    for r in range(rows):
        out[at + r] = _float_row(stored, (first + r) * cols, cols, x, x_at)


@cpu_inline
def _transform(x, x_at, matrix, block, out, at):
    """out[at : at + block] = x[x_at : x_at + block] @ matrix (block, block), not over x."""
    wide = block // 64 * 64
    for k in range(0, wide, 64):
        multiply_1x64(x, x_at, matrix, k, block, block, out, at + k)
    for k in range(wide, block, 32):
        multiply_1x32(x, x_at, matrix, k, block, block, out, at + k)


@cpu_inline
def _unit(params_at, int8, unit, blocks, part):
    """One block of rows for one token."""
    p = record_at(params_at, _MATVEC)
    w, o = p.weight, p.output
    block, columns, kind = p.block, p.columns, w.kind
    token, first = unit // blocks, unit % blocks * block
    rows = min(block, w.rows_padded - first)
    x, x_at = floats_at(p.x), token * columns
    c, at = floats_at(p.lines), part * p.lines_stride
    if w.row_start != 0:
        row_start = longs_at(w.row_start)
        start, stop = element(row_start, first), element(row_start, first + rows)
        values, offsets, starts = floats_at(p.entry_value), ints_at(p.entry_offset), longs_at(p.entry_start)
        entries_at, starts_at = part * p.entry_stride, part * p.entry_start_stride
        entry_values(w, start, stop, values, entries_at)
        index = bytes_at(w.index)
        for r in range(rows):
            row = first + r
            row_first = element(row_start, row)
            count = element(row_start, row + 1) - row_first
            e_at = entries_at + row_first - start // RUN * RUN
            if w.index_kind == BITMAP and wide_registers():
                byte = row * w.row_bytes
                c[at + r] = _bitmap_row(values, e_at, index, byte, byte + w.row_bytes, x, x_at)
            else:
                entry_columns(w, row_start, row, 1, columns, 1, offsets, e_at, starts, starts_at)
                c[at + r] = _entry_row(values, offsets, e_at, e_at + count, x, x_at)
    elif has_int8_dot() and int8:
        _rows_of_digits(p, w, token, first, rows, c, at + 2 * block, c, at)
    elif kind == INT:
        _rows_of_int(p, w, token, first, rows, x, x_at, c, at + 2 * block, c, at)
    elif kind == GRID:
        stream, scales, width, cols, gain = (
            bytes_at(w.value),
            halves_at(w.scale),
            w.bits,
            w.row_values,
            w.gain,
        )
        for r in range(rows):
            byte = (first + r) * cols // 8 * width
            y = _grid_row(stream, byte, width, w.shrink, cols, x, x_at)
            if w.exception_start != 0:
                y += times_floats(w, first + r, x, x_at)
            c[at + r] = gain * widen(element(scales, first + r)) * y
    elif kind == F32:
        _rows_of_floats(floats_at(w.value), w, first, rows, x, x_at, c, at)
    elif kind == F16:
        _rows_of_floats(halves_at(w.value), w, first, rows, x, x_at, c, at)
    elif kind == BF16:
        _rows_of_floats(bfloats_at(w.value), w, first, rows, x, x_at, c, at)
    if p.synthesis_out != 0:
        _transform(c, at, floats_at(p.synthesis_out), block, c, at + block)
        at += block
    rows = min(rows, w.rows - first)
    store_results(w, o, token, first, rows, c, at)


@cpu_inline
def store_results(w, o, token, first, rows, c, at):
    """out[token, row] = activation(c[r] + bias[row]) + residual for row = first + r, r < rows; c : from `at` on.

    w, o : records of `WEIGHT` and `OUTPUT`
    """
    for r in range(0, rows, 16):
        count = min(16, rows - r)
        y = vload_n(c, at + r, count)
        if o.bias != 0:
            y = vadd(y, vload_n(floats_at(o.bias), w.first_row + first + r, count))
        y = activate(y, o.activation)
        out_at = token * o.out_features + w.first_row + first + r
        if o.residual != 0:
            y = vadd(y, load_any(o.residual, o.residual_kind, out_at, count))
        store_any(o.out, o.out_kind, out_at, y, count)


@cpu_inline
def _transform_block(p, token, j):
    """One block of a token's activations: widened, through S^T, times a grid's column scales.

    Returns whether all are finite.
    """
    w, in_features, block, columns = p.weight, p.in_features, p.block, p.columns
    x, scratch = floats_at(p.x), floats_at(p.lines)
    x_at = token * columns + j * block
    finite = vsplat(_ZERO)
    to, to_at = x, x_at
    if p.synthesis_in != 0:
        to, to_at = scratch, np.int64(0)
    for k in range(0, block, 16):
        count = min(16, in_features - j * block - k)
        line = load_any(p.input.x, p.input.kind, token * in_features + j * block + k, count)
        vstore(to, to_at + k, line)
        finite = vfma(vmul(line, vsplat(HEADROOM)), vsplat(_ZERO), finite)
    if p.synthesis_in != 0:
        _transform(scratch, 0, floats_at(p.synthesis_in), block, x, x_at)
    if w.kind == GRID:
        scales = halves_at(w.column_scale)
        for k in range(0, block, 16):
            vstore(x, x_at + k, vmul(vload(x, x_at + k), vload(scales, j * block + k)))
    return vsum(finite) == _ZERO


@cpu_inline(inline=False)
def _part(params_at, int8, units, parts, begin, end):
    """The units of parts begin .. end, each with its own scratch memory."""
    p = record_at(params_at, _MATVEC)
    blocks = units // p.tokens
    for part in range(begin, end):
        for unit in range(units * part // parts, units * (part + 1) // parts):
            _unit(params_at, int8, unit, blocks, part)


def _matvec(params_at):
    p = record_at(params_at, _MATVEC)
    p.written = 0
    w, tokens, columns, groups = p.weight, p.tokens, p.columns, p.groups
    blocks_in = columns // p.block
    for j in range(tokens * blocks_in):
        finite = _transform_block(p, j // blocks_in, j % blocks_in)
        if not finite and (w.bits > 0 or w.row_start != 0):
            return
    x, sums = floats_at(p.x), floats_at(p.sums)
    int8 = False
    if has_int8_dot() and p.digits != 0:
        int8 = True
        twice = (1 << w.bits) - (0 if w.kind == GRID else 1)
        for token in range(tokens):
            digits, scales = _digits_of(p, token)
            if not to_digits(x, token * columns, columns, p.digit_groups, w.bits, twice, digits, scales):
                int8 = False
    if not int8 and w.kind == INT and w.row_start == 0:
        for token in range(tokens):
            for g in range(groups):
                start = g * w.group
                total = vsplat(_ZERO)
                for k in range(start, min(start + w.group, columns), 16):
                    total = vadd(total, vload(x, token * columns + k))
                sums[token * groups + g] = vsum(total)
    blocks = (w.rows_padded + p.block - 1) // p.block
    run_shares(_part, p.parts, 1, p.parts, (params_at, int8, tokens * blocks, p.parts))
    p.written = 1


#: out = activation(x W^T + bias) + residual for a few tokens: a C function of the address of a `params.MATVEC`. Where
#: x has a value that is not finite, or would not be times HEADROOM, and W is compressed, it writes only `written`.
MATVEC = c_function(_matvec)


@cpu_kernel
def _call(function, params_at):
    call_address(function, (params_at,))
    return record_at(params_at, _MATVEC).written


def matvec(params_at: int) -> bool:
    """Run `MATVEC`; whether it wrote the results."""
    return bool(_call(MATVEC(), params_at))


class MatvecCall(MatmulCall):
    """The filled struct of such a matmul, and its memory."""

    __slots__ = ()

    def __init__(self, w: Operand, n: int, in_features: int, threads: int, buffer: Any) -> None:
        block = w.block
        columns = -(-w.columns // block) * block
        entries = w.entry_room(block) if w.sparse else 0
        group = 0 if w.sparse else w["group"]
        groups = -(-columns // group) if group else 0
        digits, of_digits = 0, 0
        if has_digits(w, columns):
            of_digits = digit_groups(columns, w["bits"])
            digits = digits_bytes(columns, w["bits"]) + 4 * of_digits
        # coefficients and results of a unit, its scales
        lines = 2 * block + -(-block * max(groups, of_digits) // 16) * 16
        floats = -(-n * (columns + groups + digits // 4) // 16) * 16
        scratch = buffer(4 * floats + threads * (4 * lines + 8 * entries + 64))
        x = address(scratch)
        sums = x + 4 * n * columns
        at = x + 4 * floats
        entry_value = at + threads * 4 * lines
        entry_offset = entry_value + threads * 4 * entries
        record = params.MATVEC.record(
            weight=w.params.item(),
            tokens=n,
            in_features=in_features,
            block=block,
            columns=columns,
            parts=threads,
            synthesis_in=_synthesis(w.transform_in, block, False),
            synthesis_out=_synthesis(w.synthesis_out, block, True),
            x=x,
            groups=groups,
            sums=sums,
            digits=sums + 4 * n * groups if digits else 0,
            digits_stride=digits,
            digit_groups=of_digits,
            lines=at,
            lines_stride=lines,
            entry_value=entry_value,
            entry_offset=entry_offset,
            entry_stride=entries,
            entry_start=entry_offset + threads * 4 * entries,
            entry_start_stride=8,
        )
        super().__init__(w, params.MATVEC, record, scratch)

    kernel = staticmethod(MATVEC)

    @property
    def written_at(self) -> int:
        """Address of the field that says whether the results were written."""
        return self.params_at + _WRITTEN_AT

    def set_input(self, x: Any) -> None:
        """Read x (n, in_features) at the next call."""
        params.pack_input(self._bytes, _INPUT_AT, address(x), ENCODING[x.dtype])


def has_digits(w: Operand, columns: int) -> bool:
    """Whether `int8_dot` multiplies a weight's codes: up to 8 bits, no value shrunk, scales of whole 64 columns."""
    if w.sparse or columns % STEP or not 2 <= w["bits"] <= 8:
        return False
    return w["group"] % STEP == 0 if w["kind"] == INT else float(w.params["shrink"][0]) == 0


def _synthesis(transform: str, block: int, transposed: bool) -> int:
    """Address of a transform's synthesis matrix, which its cache keeps; 0 for none."""
    return (
        0
        if transform == "none"
        else address(transforms.cast_synthesis(transform, block, transposed=transposed))
    )
