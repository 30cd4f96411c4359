"""Stored codes to what `matmul_rows` multiplies with: entries of sparse rows, or rows of dense ones, a few at a time.

Everything here runs inside a matmul, on scratch memory of a thread: the positions and values of some rows, or some
columns of them, exist for as long as they are multiplied. `w` is a record of `params.WEIGHT`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rbe_gpu.codecs.packing import RUN

from . import params
from ._jit import cpu_inline
from ._numba_internals import cgutils
from ._parts import c_function, record_at
from .arrays import (
    BF16,
    F16,
    GRID,
    INT,
    bfloats_at,
    bytes_at,
    floats_at,
    halves_at,
    ints_at,
    longs_at,
    words_at,
)
from .exceptions import exception_column, exception_delta, exceptions_from
from .isa import isa_of
from .simd import (
    LANES,
    element,
    vec16,
    vfma,
    vload,
    vmul,
    vselect_less,
    vsplat,
    vstore,
    vsub,
    wide_registers,
    widen,
)
from .unpack import unpack_run

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
FULL, BITMAP, DELTA = 0, 1, 2
_WEIGHT = params.WEIGHT.dtype


@intrinsic
def _compress_columns(typingctx, index, byte, first, step, out, at):  # type: ignore[no-untyped-def]
    """_compress_columns(index, byte, first, step, out, at) -> how many: out[at ...] = first + c * step for
    the bits c set in the 16 at `byte`. Writes 16 words; those behind the count are undefined."""
    if not isinstance(index, types.Array) or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i16, i32 = ir.IntType(16), ir.IntType(32)
        words = ir.VectorType(i32, LANES)
        bits = ir.VectorType(ir.IntType(1), LANES)
        index_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        out_data = context.make_array(signature.args[4])(context, builder, args[4]).data
        source = builder.bitcast(builder.gep(index_data, [args[1]]), i16.as_pointer())
        mask = builder.load(source, align=1)
        zeros = ir.Constant(words, [0] * LANES)
        undefined = ir.Constant(words, ir.Undefined)

        def splat(value):  # type: ignore[no-untyped-def]
            lane = builder.insert_element(undefined, builder.trunc(value, i32), i32(0))
            return builder.shuffle_vector(lane, undefined, zeros)

        ramp = ir.Constant(words, list(range(LANES)))
        columns = builder.add(splat(args[2]), builder.mul(ramp, splat(args[3])))
        name = "llvm.experimental.vector.compress.v16i32"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(words, [words, bits, words]), name
        )
        packed = builder.call(function, [columns, builder.bitcast(mask, bits), undefined])
        target = builder.bitcast(builder.gep(out_data, [args[5]]), words.as_pointer())
        builder.store(packed, target, align=4)
        count = builder.ctpop(mask)
        return builder.zext(count, ir.IntType(64))

    index64 = types.int64
    return index64(index, index64, index64, index64, out, index64), codegen


@intrinsic
def expand(typingctx, values, at, index, byte):  # type: ignore[no-untyped-def]
    """expand(values, at, index, byte) -> vec16: the values from element `at` on, one for every bit set in the 16 at
    index[byte], in the lanes of those bits; zeros in the others."""
    if not isinstance(values, types.Array) or not isinstance(index, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        floats = ir.VectorType(ir.FloatType(), LANES)
        bits = ir.VectorType(ir.IntType(1), LANES)
        value_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        index_data = context.make_array(signature.args[2])(context, builder, args[2]).data
        source = builder.bitcast(builder.gep(index_data, [args[3]]), ir.IntType(16).as_pointer())
        mask = builder.bitcast(builder.load(source, align=1), bits)
        pointer = builder.gep(value_data, [args[1]])
        if isa_of(context).has("avx512f"):  # from a register: the instruction that reads memory is slower
            kind = ir.FunctionType(floats, [floats, floats, bits])
            name = "llvm.x86.avx512.mask.expand.v16f32"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            loaded = builder.load(builder.bitcast(pointer, floats.as_pointer()), align=4)
            return builder.call(function, [loaded, ir.Constant(floats, [0.0] * LANES), mask])
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(floats, [pointer.type, bits, floats]),
            "llvm.masked.expandload.v16f32",
        )
        return builder.call(function, [pointer, mask, ir.Constant(floats, [0.0] * LANES)])

    return vec16(values, types.int64, index, types.int64), codegen


@intrinsic
def count_bits(typingctx, index, byte):  # type: ignore[no-untyped-def]
    """count_bits(index, byte) -> how many of the 16 bits at index[byte] are set."""
    if not isinstance(index, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        index_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        source = builder.bitcast(builder.gep(index_data, [args[1]]), ir.IntType(16).as_pointer())
        return builder.zext(builder.ctpop(builder.load(source, align=1)), ir.IntType(64))

    return types.int64(index, types.int64), codegen


@intrinsic
def _gaps_to_columns(typingctx, gaps, byte, before, step, out, at):  # type: ignore[no-untyped-def]
    """_gaps_to_columns(gaps, byte, before, step, out, at) -> the last: sixteen entries of a delta stream.

    out[at + i] = before + step * (1 + gaps[byte] + ... + 1 + gaps[byte + i]), i < 16. The last is summed by
    itself, in two words of eight bytes: groups of sixteen wait for that, and not for the running sums.
    """
    if not isinstance(gaps, types.Array) or not isinstance(out, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        words = ir.VectorType(i32, LANES)
        gap_data = context.make_array(signature.args[0])(context, builder, args[0]).data
        out_data = context.make_array(signature.args[4])(context, builder, args[4]).data
        address = builder.gep(gap_data, [args[1]])
        source = builder.bitcast(address, ir.VectorType(i8, LANES).as_pointer())
        undefined, zero = ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * LANES)

        def splat(value):  # type: ignore[no-untyped-def]
            lane = builder.insert_element(undefined, builder.trunc(value, i32), i32(0))
            return builder.shuffle_vector(lane, undefined, zero)

        total = builder.add(
            builder.zext(builder.load(source, align=1), words), ir.Constant(words, [1] * LANES)
        )
        for shift in (1, 2, 4, 8):  # running sums in four rounds
            lanes = [LANES + lane - shift if lane >= shift else 0 for lane in range(LANES)]
            moved = builder.shuffle_vector(zero, total, ir.Constant(words, lanes))
            total = builder.add(total, moved)
        columns = builder.add(builder.mul(total, splat(args[3])), splat(args[2]))
        builder.store(columns, builder.bitcast(builder.gep(out_data, [args[5]]), words.as_pointer()), align=4)
        pairs = i64(0)  # four sums of two bytes of each word
        for word in range(2):
            eight = builder.load(
                builder.gep(builder.bitcast(address, i64.as_pointer()), [i32(word)]), align=1
            )
            for half in (eight, builder.lshr(eight, i64(8))):
                pairs = builder.add(pairs, builder.and_(half, i64(0x00FF00FF00FF00FF)))
        gap_sum = builder.lshr(builder.mul(pairs, i64(0x0001000100010001)), i64(48))
        return builder.add(args[2], builder.mul(builder.add(gap_sum, i64(LANES)), args[3]))

    i = types.int64
    return i(gaps, i, i, i, out, i), codegen


@intrinsic
def _count_below(typingctx, array, at, bound):  # type: ignore[no-untyped-def]
    """_count_below(array, at, bound) -> how many of the 16 words from element `at` on are below `bound`."""
    if not isinstance(array, types.Array):
        return None

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32 = ir.IntType(32)
        words = ir.VectorType(i32, LANES)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), words.as_pointer()), align=4)
        undefined = ir.Constant(words, ir.Undefined)
        lane = builder.insert_element(undefined, builder.trunc(args[2], i32), i32(0))
        limit = builder.shuffle_vector(lane, undefined, ir.Constant(words, [0] * LANES))
        below = builder.bitcast(builder.icmp_signed("<", loaded, limit), ir.IntType(LANES))
        return builder.zext(builder.ctpop(below), ir.IntType(64))

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def _trailing_zeros(typingctx, word):  # type: ignore[no-untyped-def]
    """_trailing_zeros(word) of a uint32 that is not 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        zeros = builder.cttz(args[0], ir.IntType(1)(1))
        return builder.zext(zeros, ir.IntType(64))

    return types.int64(types.uint32), codegen


@cpu_inline
def _scaled(stored, first, stop, gain, out, at):
    """out[at : at + stop - first] = gain * stored[first : stop]."""
    factor, whole = vsplat(gain), first + (stop - first) // 16 * 16
    for e in range(first, whole, 16):
        vstore(out, at + e - first, vmul(factor, vload(stored, e)))
    for e in range(whole, stop):
        out[at + e - first] = gain * widen(element(stored, e))


@cpu_inline
def entry_values(w, first, stop, out, at):
    """out[at + e - base] = the value of entry e, first <= e < stop; base = first rounded down to a run of 32.

    b-bit codes stand for gain * sign * (dead_zone + scale * (m + 1/2)). Up to 31 elements behind the last are written
    too.
    """
    kind, width, group, dead_zone, gain = w.kind, w.bits, w.group, w.dead_zone, w.gain
    base = first // RUN * RUN
    if kind == INT:
        stream, scales = bytes_at(w.value), halves_at(w.scale)
        shift = _HALF - np.float32(1 << (width - 1))  # u + shift is m + 1/2 with its sign
        positive, negative, zero = vsplat(gain * dead_zone), vsplat(-gain * dead_zone), vsplat(_ZERO)
        for run in range(base // RUN, (stop + RUN - 1) // RUN):
            run_at = at + run * RUN - base
            unpack_run(stream, run * 4 * width, width, _ONE, shift, out, run_at)
            s = vsplat(gain * widen(element(scales, run * RUN // group)))
            for part in range(2):
                t = vload(out, run_at + 16 * part)
                vstore(out, run_at + 16 * part, vfma(t, s, vselect_less(t, zero, negative, positive)))
    elif kind == F16:
        _scaled(halves_at(w.value), first, stop, gain, out, at + first - base)
    else:
        _scaled(floats_at(w.value), first, stop, gain, out, at + first - base)


@cpu_inline
def entry_columns(w, row_start, row, step, panel, panels, out, at, start, start_at):
    """out[at + i] = column of the row's i-th entry * step; start[start_at + p] = at + its first entry of
    panel p.

    Bitmap rows have `row_bytes` bytes, a delta stream has a byte per entry.
    panel : columns of a panel, a multiple of 32. Up to 16 elements behind the last are written too.
    """
    kind, row_bytes, positions = w.index_kind, w.row_bytes, bytes_at(w.index)
    first = element(row_start, row)
    count, stream = element(row_start, row + 1) - first, element(row_start, w.rows_padded)
    start[start_at] = at
    if kind == FULL:
        for i in range(count):
            out[at + i] = np.int32(i * step)
        for p in range(1, panels):
            start[start_at + p] = at + min(p * panel, count)
    elif kind == BITMAP:
        e = np.int64(at)
        words = words_at(w.index)
        chunk = panel // 8
        for p in range(panels):
            start[start_at + p] = e
            low, high = p * chunk, min((p + 1) * chunk, row_bytes)
            if wide_registers():
                for byte in range(low, high, 2):
                    e += _compress_columns(positions, row * row_bytes + byte, byte * 8 * step, step, out, e)
            else:
                for byte in range(low, high, 4):
                    word = element(words, (row * row_bytes + byte) // 4)
                    while word != np.uint32(0):
                        out[e] = np.int32((byte * 8 + _trailing_zeros(word)) * step)
                        e += 1
                        word &= word - np.uint32(1)
    else:
        column, p, i = np.int64(-step), 1, 0
        bound = panel * step
        while i < count and first + i + 16 <= stream:
            column = _gaps_to_columns(positions, first + i, column, step, out, at + i)
            if p < panels:  # at most one panel begins in most groups: no branch to guess
                below = _count_below(out, at + i, bound)
                start[start_at + p] = at + min(i + below, count)
                begun = 1 if below < 16 else 0
                p += begun
                bound += begun * panel * step
                while begun == 1 and p < panels and column >= bound:
                    start[start_at + p] = at + min(i + _count_below(out, at + i, bound), count)
                    p += 1
                    bound += panel * step
            i += 16
        while i < count:  # where sixteen gaps would reach beyond the stream
            column += (np.int64(element(positions, first + i)) + 1) * step
            out[at + i] = np.int32(column)
            while p < panels and column >= bound:
                start[start_at + p] = at + i
                p += 1
                bound += panel * step
            i += 1
        while p < panels:
            start[start_at + p] = at + count
            p += 1


# Rows of dense codes, a function for each encoding of values:
# out[r, c] = coefficient [first + r, column + c], r < rows, c < cols; of packed codes, whole runs of 32.
#     weight : address of a `params.WEIGHT`
#     out : address of float32 rows, `out_row` values from one to the next


def _int_rows(weight, first, rows, column, cols, out, out_row):
    w, lines = record_at(weight, _WEIGHT), floats_at(out)
    width, gain, row_values = w.bits, w.gain, w.row_values
    group, stream, scales = w.group, bytes_at(w.value), halves_at(w.scale)
    middle = np.float32((1 << width) - 1) * _HALF
    groups = (row_values + group - 1) // group
    for r in range(rows):
        row = first + r
        for c in range(0, cols, RUN):
            s = gain * widen(element(scales, row * groups + (column + c) // group))
            byte = (row * row_values + column + c) // 8 * width
            unpack_run(stream, byte, width, s, -s * middle, lines, r * out_row + c)


@cpu_inline
def grid_integers(w, row, column, cols, out, at):
    """out[at + c] = integer [row, column + c] of grid codes, c < cols, in whole runs of 32."""
    width, stream = w.bits, bytes_at(w.value)
    half, byte = np.float32(1 << (width - 1)), (row * w.row_values + column) // 8 * width
    for c in range(0, cols, RUN):
        unpack_run(stream, byte, width, _ONE, -half, out, at + c)
        byte += 4 * width
    if w.exception_start != 0:
        e, stop = exceptions_from(w, row, column)
        while e < stop and exception_column(w, e) < column + cols:
            out[at + exception_column(w, e) - column] += np.float32(exception_delta(w, e))
            e += 1


@cpu_inline
def scale_grid_integers(w, row, column, cols, out, at):
    """What `grid_integers` wrote to coefficients, in place."""
    scale = w.gain * widen(element(halves_at(w.scale), row))
    scale_integers(scale, halves_at(w.column_scale), w.shrink, column, cols, out, at)


@cpu_inline
def scale_integers(scale, column_scale, shrink, column, cols, out, at):
    """out[at + c] = scale * column_scale[column + c] * (q - sign(q) * shrink) of q = out[at + c], c < cols."""
    zero, up, down = vsplat(_ZERO), vsplat(shrink), vsplat(-shrink)
    s = vsplat(scale)
    for c in range(0, cols, 16):
        q = vload(out, at + c)
        towards = vselect_less(q, zero, down, vselect_less(zero, q, up, zero))
        vstore(out, at + c, vmul(vmul(s, vload(column_scale, column + c)), vsub(q, towards)))


def _grid_rows(weight, first, rows, column, cols, out, out_row):
    w, lines = record_at(weight, _WEIGHT), floats_at(out)
    for r in range(rows + 1):
        if r < rows:
            grid_integers(w, first + r, column, cols, lines, r * out_row)
        if r > 0:  # a row later: loads of vectors wait 20 ns for an exception that was just stored
            scale_grid_integers(w, first + r - 1, column, cols, lines, (r - 1) * out_row)


@cpu_inline
def _widened(stored, first, rows, column, cols, row_values, out, out_row):
    whole = cols // 16 * 16
    for r in range(rows):
        at, out_at = (first + r) * row_values + column, r * out_row
        for c in range(0, whole, 16):
            vstore(out, out_at + c, vload(stored, at + c))
        for c in range(whole, cols):
            out[out_at + c] = widen(element(stored, at + c))


def _float16_rows(weight, first, rows, column, cols, out, out_row):
    w = record_at(weight, _WEIGHT)
    _widened(halves_at(w.value), first, rows, column, cols, w.row_values, floats_at(out), out_row)


def _bfloat16_rows(weight, first, rows, column, cols, out, out_row):
    w = record_at(weight, _WEIGHT)
    _widened(bfloats_at(w.value), first, rows, column, cols, w.row_values, floats_at(out), out_row)


CODE_ROWS = {
    INT: c_function(_int_rows),
    GRID: c_function(_grid_rows),
    F16: c_function(_float16_rows),
    BF16: c_function(_bfloat16_rows),
}


def _basis_entries(weight, first, rows, row_functions, depth, step, start, offset, value):
    """The basis part of `rows` parameter rows as entries: `row_functions` rows of entries for each of them.

    weight : address of a `params.WEIGHT`
    depth : where the input's basis features begin; step : floats from one feature to the next
    start, offset, value : addresses of what is written, int64, int32 and float32
    """
    w = record_at(weight, _WEIGHT)
    starts, offsets, values = longs_at(start), ints_at(offset), floats_at(value)
    blocks, count, features, terms, gain = w.basis_blocks, w.basis_params, w.features, w.terms, w.gain
    term_row, term_column = longs_at(w.term_row), longs_at(w.term_column)
    term_param, term_factor = longs_at(w.term_param), floats_at(w.term_factor)
    halves = halves_at(w.basis)
    e = np.int64(0)
    for r in range(rows):
        t = 0
        for f in range(row_functions):
            starts[r * row_functions + f] = e
            t_first = t
            while t < terms and element(term_row, t) == f:
                t += 1
            for j in range(blocks):
                for term in range(t_first, t):
                    param = ((first + r) * blocks + j) * count + element(term_param, term)
                    values[e] = gain * widen(element(halves, param)) * element(term_factor, term)
                    offsets[e] = np.int32((depth + j * features + element(term_column, term)) * step)
                    e += 1
    starts[rows * row_functions] = e


BASIS_ENTRIES = c_function(_basis_entries)
